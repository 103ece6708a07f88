"""Patience with a network, and its limit."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from configs.errors import DataError

WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)  # 31 s in all: an outage of half a minute is ridden out
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


def patiently(read: Callable[[], Result], place: str, *, remote: bool) -> Result:
    """The result of `read`, tried again with longer and longer waits where the place is remote.

    Raises DataError once it has failed six times, or at once for what waiting does not mend.
    """
    for number, wait_seconds in enumerate((*WAITS_SECONDS, None)):
        try:
            return read()
        except network_faults() as error:
            text = " ".join(str(error).split())[:300] or type(error).__name__
            lasting = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
            if not remote or lasting or wait_seconds is None:
                tries = f" (tried {number + 1} times in {sum(WAITS_SECONDS):.0f} s)" if wait_seconds is None else ""
                raise DataError(
                    f"cannot read the data: {text}{tries}",
                    where=place,
                    fix="once it can be read, the same command continues the run from its last checkpoint",
                ) from None
            if number == 1:  # a single hiccup is not worth a line
                print(f"waiting for {place}: {text}", file=sys.stderr, flush=True)
            time.sleep(wait_seconds)
    raise AssertionError("unreachable")
