"""Patience with a network, and its limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from configs.errors import DataError

WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)  # 31 s in all: an outage of half a minute is ridden out
LASTING = (401, 403, 404, 410)  # answers of a server that it would give again
Result = TypeVar("Result")


def network_faults() -> tuple[type[BaseException], ...]:
    """What the clients under `datasets` raise when a server, the network or a body is at fault."""
    import aiohttp
    import fsspec.exceptions
    import httpx
    import pyarrow

    return (
        OSError,
        EOFError,
        aiohttp.ClientError,
        httpx.HTTPError,
        fsspec.exceptions.FSTimeoutError,
        pyarrow.ArrowInvalid,
    )


def cause_of(error: BaseException) -> BaseException:
    """What happened: fsspec reports a connection that was refused as a file that is not there."""
    import aiohttp

    return error.__cause__ if isinstance(error.__cause__, aiohttp.ClientError) else error


def is_lasting(fault: BaseException) -> bool:
    """Whether waiting does not mend it."""
    status = getattr(fault, "status", None)  # of an HTTP answer
    return status in LASTING if status else isinstance(fault, (FileNotFoundError, PermissionError, IsADirectoryError))


def patiently(read: Callable[[], Result], place: str, *, remote: bool) -> Result:
    """The result of `read`, tried again with longer and longer waits where the place is remote.

    Raises DataError once it has failed six times, or at once for what waiting does not mend.
    """
    for number, wait_seconds in enumerate((*WAITS_SECONDS, None)):
        try:
            return read()
        except network_faults() as error:
            fault = cause_of(error)
            text = " ".join(str(fault).split())[:300] or type(fault).__name__
            if not remote or is_lasting(fault) or wait_seconds is None:
                tries = f" (tried {number + 1} times in {sum(WAITS_SECONDS):.0f} s)" if wait_seconds is None else ""
                again = "the same command continues the run from its last checkpoint"
                raise DataError(
                    f"cannot read the data: {text}{tries}",
                    where=place,
                    fix=f"once it can be read, {again}" if remote else f"replace the file; then {again}",
                ) from None
            if number == 1:  # a single hiccup is not worth a line
                print(f"waiting for {place}: {text}", file=sys.stderr, flush=True)
            time.sleep(wait_seconds)
    raise AssertionError("unreachable")
