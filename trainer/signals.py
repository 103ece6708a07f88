"""Signals that ask a run to stop: noted by a handler, acted upon where nothing can be damaged.

This module imports no torch, so that a script can note signals before the long imports begin.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

# What a scheduler, a person and SLURM send. The position + 1 is the word that processes exchange.
STOPS = ("SIGTERM", "SIGINT", "SIGUSR1")
LAUNCHER_GONE = "the launcher has gone"
REASONS = (*STOPS, LAUNCHER_GONE)
LAUNCHERS = (
    "torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "accelerate.commands.launch",
)  # fmt: skip


class Preempted(BaseException):
    """A run is asked to stop. Like KeyboardInterrupt no Exception: no library may swallow it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class _Noted:
    """What the handler knows; one for the process, as signals are."""

    signal: str | None = None  # the first that came; later ones change nothing
    launcher: int | None = None  # the process that started this one, where it is a launcher
    at_once = False
    can_save = False


def numbers_of_stops() -> list[int]:
    return [getattr(signal, name) for name in STOPS if hasattr(signal, name)]


@contextmanager
def noted(*, can_save: bool = False) -> Iterator[None]:
    """Inside, SIGTERM, SIGINT and SIGUSR1 are only noted; afterwards the handlers of before are back.

    can_save: whoever looks for the signal has something to save. Threads other than the main one cannot set handlers:
    there nothing changes.
    """
    numbers, outer = numbers_of_stops(), _Noted.can_save
    in_main_thread = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {}
    if in_main_thread and signal.getsignal(numbers[0]) is not _note:
        before = {number: signal.signal(number, _note) for number in numbers}
        _Noted.launcher = launcher_of(os.getppid())
    _Noted.can_save = can_save
    try:
        yield
    finally:
        _Noted.can_save = outer
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if before:
            _Noted.signal = None


@contextmanager
def at_once() -> Iterator[None]:
    """Inside `noted`, where there is nothing to save: Preempted is raised as soon as a signal comes, or has come."""
    _Noted.at_once = True
    try:
        if _Noted.signal:
            raise Preempted(_Noted.signal)
        yield
    finally:
        _Noted.at_once = False


@contextmanager
def as_usual() -> Iterator[None]:
    """Inside `noted`, for what waits in a library until others come: signals end the process, as they always do."""
    handlers = {number: signal.getsignal(number) for number in numbers_of_stops()}
    if threading.current_thread() is not threading.main_thread() or _note not in handlers.values():
        yield
        return
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop_reason() -> str | None:
    """Why this process should stop; None as long as it may go on."""
    if _Noted.signal is None and _Noted.launcher is not None and os.getppid() != _Noted.launcher:
        return LAUNCHER_GONE  # it cannot pass signals on any more, and nobody else would stop this process
    return _Noted.signal


def _note(number: int, frame: FrameType | None) -> None:
    first, _Noted.signal = _Noted.signal is None, _Noted.signal or signal.Signals(number).name
    if first and _Noted.at_once:
        raise Preempted(_Noted.signal)
    if first and os.environ.get("RANK", "0") == "0":
        then = "saving after this step, then stopping" if _Noted.can_save else "stopping"
        with suppress(OSError):  # of a pipe whose reader got the signal, too
            os.write(2, f"\n{_Noted.signal}: {then}\n".encode())


def launcher_of(process: int) -> int | None:
    """This process id if it is one of a launcher, which a run must not outlive; a shell or nohup is none."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no Linux
        return process if "TORCHELASTIC_RUN_ID" in os.environ else None
    return process if any(Path(word).name in LAUNCHERS or word in LAUNCHERS for word in words[:4]) else None
