"""Text for a terminal of 80 columns, a log file and a phone."""

from __future__ import annotations

import textwrap

COLUMNS = 80


def wrapped(head: str, text: str) -> str:
    """`head` in a column of its own, the text beside it; words stay whole."""
    return head if not text else textwrap.fill(
        text, COLUMNS, initial_indent=f"{head:<10}", subsequent_indent=" " * 10,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
