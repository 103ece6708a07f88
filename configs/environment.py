"""What environment variables say. Imports nothing that takes long."""

from __future__ import annotations

import os

OFF = ("", "0", "false", "no", "none")


def is_on(variable: str, off: tuple[str, ...] = OFF) -> bool:
    """Launchers write a "False" as well."""
    return os.environ.get(variable, "").lower() not in off


def cores() -> int:
    """That this process may use: a job may have been given some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def int_of(variable: str) -> int:
    """1 where it is not set, or no number."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 1
