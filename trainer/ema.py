"""Exponential moving average of the weights (Polyak & Juditsky 1992), used wherever a model is judged or kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of parameters and floating-point buffers; whole-number buffers are copied.

    The decay grows as (1 + step) / (10 + step) up to its value, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        tensors = model.state_dict(keep_vars=True)
        self.copied = {name: t.detach() for name, t in tensors.items() if not t.is_floating_point()}
        live = {id(t): t.detach() for t in tensors.values() if t.is_floating_point()}  # tied weights once
        average = {key: t.clone() for key, t in live.items()}
        self.average = {name: average[id(t)] for name, t in tensors.items() if t.is_floating_point()}
        self._live, self._average = list(live.values()), list(average.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after update number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages inside this block."""
        with torch.no_grad():
            kept = [t.clone() for t in self._live]
            torch._foreach_copy_(self._live, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """All that the model's own state dict holds, averaged."""
        tensors = (self.average | self.copied).items()
        return {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
