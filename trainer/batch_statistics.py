"""BatchNorm's running statistics: one update a step, whatever micro-batches and processes computed it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from configs.errors import DataError
from trainer.processes import precise
from trainer.windows import Batch, Window, samples_in


class BatchStatistics:
    """Every micro-batch starts from the statistics of before the step, which then become the mean of what came out.

    One micro-batch of one process is left alone. reduce: the sum of a tensor over processes; None for one alone.
    """

    def __init__(self, model: Any, reduce: Any):
        self.reduce = reduce
        resting = model.resting_norms()
        norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
        norms = [norm for norm in norms if norm not in resting]
        self.norms = norms
        self.running = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
        self.counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self.dtype = precise(self.running[0].device) if self.running else torch.float64
        self.merges = False

    def begin_step(self, window: Window) -> None:
        self.merges = bool(self.running) and (len(window.batches) > 1 or self.reduce is not None)
        if self.merges:  # buffers need no gradient
            if len(window.batches) > 1:
                self.before = [[t.clone() for t in tensors] for tensors in (self.running, self.counters)]
            self.sums = self.nothing()

    def after_micro_batch(self, window: Window) -> None:
        """Note what the micro-batch made of them; after the last one of the step all processes take the mean."""
        if self.merges:
            self.merge(window)

    @torch.no_grad()
    def merge(self, window: Window) -> None:
        self.sums = self.sums + self.weighed(window.batches[window.number])
        if not window.is_last:
            for tensors, before in zip((self.running, self.counters), self.before):
                if tensors:
                    torch._foreach_copy_(tensors, before)
            return
        self.take(self.sums)

    @torch.no_grad()
    def measure(self, model: nn.Module, batches: Iterable[Batch], forward: Callable[[Batch], object]) -> None:
        """Make them the mean of these micro-batches' own, for weights that no step has made. All but the norms that
        were training computes as in an evaluation."""
        norms = [norm for norm in self.norms if norm.training]
        kept, counters, sums = [norm.momentum for norm in norms], [t.clone() for t in self.counters], self.nothing()
        model.eval()
        try:
            for norm in norms:
                norm.train()
                norm.momentum = 1.0  # nothing is left of what was before
            for batch in batches:
                forward(batch)
                sums = sums + self.weighed(batch)
        finally:
            for norm, momentum in zip(norms, kept):
                norm.momentum = momentum
            if counters:
                torch._foreach_copy_(self.counters, counters)
        if not sums.dim():
            raise DataError(
                "the train_loader gave no batch to measure BatchNorm's statistics on",
                fix="a generator gives its batches once: pass a list or a loader",
            )
        self.take(sums)

    def nothing(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.running[0].device)

    def weighed(self, batch: Batch) -> Tensor:
        """The statistics of now times the samples of the batch, and their number."""
        flat = torch.cat([t.flatten() for t in self.running]).to(self.dtype)
        return samples_in(batch) * torch.cat([flat, flat.new_ones(1)])

    def take(self, sums: Tensor) -> None:
        """The mean over all processes."""
        sums = sums if self.reduce is None else self.reduce(sums)
        means = (sums[:-1] / sums[-1]).to(self.running[0].dtype).split([t.numel() for t in self.running])
        torch._foreach_copy_(self.running, [mean.view_as(t) for mean, t in zip(means, self.running)])
