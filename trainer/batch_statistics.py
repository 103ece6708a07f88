"""BatchNorm's running statistics: one update a step, whatever micro-batches and processes computed it."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from trainer.windows import Window, samples_in


class BatchStatistics:
    """Every micro-batch starts from the statistics of before the step, which then become the mean of what came out.

    One micro-batch of one process is left alone. reduce: the sum of a tensor over processes; None for one alone.
    """

    def __init__(self, model: Any, reduce: Any):
        self.reduce = reduce
        resting = model.resting_norms()
        norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
        norms = [norm for norm in norms if norm not in resting]
        self.running = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
        self.counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        # so many digits that the order of a sum does not show; MPS has no more
        self.dtype = torch.float32 if any(t.device.type == "mps" for t in self.running) else torch.float64
        self.merges = False

    def begin_step(self, window: Window) -> None:
        self.merges = bool(self.running) and (len(window.batches) > 1 or self.reduce is not None)
        if self.merges:  # buffers need no gradient
            self.before = [[t.clone() for t in tensors] for tensors in (self.running, self.counters)]
            self.sums = torch.zeros((), dtype=self.dtype, device=self.running[0].device)

    def after_micro_batch(self, window: Window) -> None:
        """Note what the micro-batch made of them; after the last one of the step all processes take the mean."""
        if self.merges:
            self.merge(window)

    @torch.no_grad()
    def merge(self, window: Window) -> None:
        samples = samples_in(window.batches[window.number])
        flat = torch.cat([t.flatten().to(self.dtype) for t in self.running])
        self.sums = self.sums + samples * torch.cat([flat, flat.new_ones(1)])
        if not window.is_last:
            for tensors, before in zip((self.running, self.counters), self.before):
                if tensors:
                    torch._foreach_copy_(tensors, before)
            return
        sums = self.sums if self.reduce is None else self.reduce(self.sums)
        means = (sums[:-1] / sums[-1]).split([t.numel() for t in self.running])
        torch._foreach_copy_(self.running, [mean.view_as(t).to(t.dtype) for mean, t in zip(means, self.running)])
