"""Of several processes that meet the same fault one tells it. Imports nothing that takes long."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

PATIENCE_SECONDS = 20


def is_first_here() -> bool:
    """Of this machine's processes: other machines may have other files."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def tell(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(text if rank == "0" else f"[process {rank}] {text}", file=sys.stderr, flush=True)


def tell_once(text: str) -> None:
    """What all processes of this machine have to say: the first tells it, and its end makes the launcher end the
    others. One that ended before it would make the launcher end the first, perhaps before it has told anything."""
    if not is_first_here():
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
        time.sleep(PATIENCE_SECONDS)  # longer only where the first did not meet it
    tell(text)
