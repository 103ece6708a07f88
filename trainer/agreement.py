"""What one process has to say, all of them know a step later; nobody waits for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """Words (whole numbers) that processes exchange at every step: all act on the same ones at the same step.

    One process alone acts at once. Several exchange on the CPU beside the computation: what is said at one call is
    heard at the next.
    """

    def __init__(self, processes: int, words: int):
        self.group: Any = dist.new_group(backend="gloo") if processes > 1 else None
        self.words = torch.zeros(words, dtype=torch.int64)
        self.pending: dist.Work | None = None

    def exchange(self, *words: int) -> list[int]:
        """The largest of each word that any process said at the call before. Every process calls it as often."""
        if self.group is None:
            return list(words)
        heard = self.hear()
        self.words = torch.tensor(words)
        self.pending = dist.all_reduce(self.words, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return heard

    def hear(self) -> list[int]:
        """What is on its way."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
        heard = self.words.tolist()
        self.words = torch.zeros_like(self.words)
        return heard
