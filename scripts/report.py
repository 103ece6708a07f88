"""How scripts end: a fault becomes one block that says what, where and what to do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

from configs.errors import ConfigError, UserError, is_of_another_process
from configs.secrets import hide_secrets
from configs.telling import is_first_here, tell, tell_once

ROOT = Path(__file__).resolve().parent.parent
UNUSED = "finished reduction in the prior iteration"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def outlive_readers() -> None:
    """What reads our output may end first, as `tee` does by the same Ctrl-C: then the rest is said to nobody."""
    for stream in (sys.stdout, sys.stderr):
        for name in ("write", "flush"):
            setattr(stream, name, unless_closed(getattr(stream, name), stream))


def unless_closed(method: Any, stream: TextIO) -> Any:
    def call(*given: Any) -> Any:
        try:
            return method(*given)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

    return call


def leave(code: int) -> NoReturn:
    """End at once. The interpreter's own end would wait for a tracker that hangs, and take itself apart under the
    threads of gloo that may still hold tensors (SIGABRT, now and then, after a good run)."""
    for loader in multiprocessing.active_children():
        loader.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def block(error: BaseException) -> tuple[str, int]:
    """The words for an error, and the exit code."""
    fault = told(error)
    return str(fault), fault.exit_code


def told(error: BaseException) -> UserError:
    """Any error as what, where and what to do."""
    if isinstance(error, UserError):
        return error
    if type(error).__name__ == "ModelError":
        return ConfigError(str(error))
    lines, notes = (str(error).strip() or type(error).__name__).splitlines(), getattr(error, "__notes__", [])
    in_worker = (
        "in DataLoader worker" in lines[0]
    )  # then the error is its last line, but for the note of data/batches.py
    if in_worker and lines[-1].startswith(("sample ", "one of the samples ")):
        notes = [lines.pop(), *notes]
    text = (lines[-1] if in_worker else lines[0])[:400]
    if is_of_another_process(error):
        fix = "see what that one says; if it was killed, for lack of memory for example, the same command continues"
        return UserError("this process stops, since another one has ended", fix=fix)
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY):
        fix = "lower --micro_batch_size: the result stays that of the whole --batch_size; or lower --image_size"
        return UserError(f"out of memory: {text}", where=place(error), fix=fix)
    if "No space left" in text or getattr(error, "errno", None) in (errno.EROFS, errno.EACCES, errno.EDQUOT):
        fix = "free some space, or choose another --output_dir; a saved run continues by the same command"
        return UserError(f"cannot write: {text}", where=place(error), fix=fix)
    if UNUSED in text:
        fix = "let every parameter take part in the loss, or take --find_unused_parameters"
        return UserError("DDP: some parameters took no part in the step before", where=place(error), fix=fix)
    if "does not have a deterministic implementation" in text:
        fix = "leave --deterministic out, or choose another --model"
        return UserError(f"--deterministic: {text.split(', but ')[0]}", where=place(error), fix=fix)
    fix = "run again with --debug for the whole traceback"
    where = ", ".join([place(error), *notes])
    return UserError(text if in_worker else f"{type(error).__name__}: {text}", where=where, fix=fix)


def place(error: BaseException) -> str:
    """The innermost line of this project that the error came through."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT) and "site-packages" not in frame.filename
    ]
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno} in {ours[-1].name}" if ours else ""


def fail(error: Exception, *, debug: bool) -> int:
    """Print the block, on one process of a machine where all of them fail alike; the exit code."""
    if debug:
        print(hide_secrets("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    text, code = block(error)
    text = hide_secrets(text)  # the hub answers by signed addresses, which errors of the network repeat
    if met_by_all(error):
        tell_once(text)
    elif is_first_here() or not is_of_another_process(error):
        tell(text)
    return code


def met_by_all(error: Exception) -> bool:
    """Whether the other processes meet this error, too, so that one of them tells it."""
    if isinstance(error, UserError):
        return not error.of_one_process
    return type(error).__name__ == "ModelError" or UNUSED in str(error)
