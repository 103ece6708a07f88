"""What environment variables say. Imports nothing that takes long."""

from __future__ import annotations

import os

OFF = ("", "0", "false", "no", "none")


def is_on(variable: str, off: tuple[str, ...] = OFF) -> bool:
    """Launchers write a "False" as well."""
    return os.environ.get(variable, "").lower() not in off


def int_of(variable: str) -> int:
    """1 where it is not set, or no number."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else 1
