"""Averages of the weights, used wherever a model is judged or kept: here the moving one, in swa.py that of epochs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trainer.sharding import distributed, part, whole


class AveragedWeights(ABC):
    """Averages of parameters and floating-point buffers; whole-number buffers are copied."""

    def __init__(self, model: nn.Module):
        tensors = model.state_dict(keep_vars=True)
        self.copied = {name: t.detach() for name, t in tensors.items() if not t.is_floating_point()}
        self.tensors = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
        live = {id(t): part(t.detach()) for t in tensors.values() if t.is_floating_point()}  # tied weights once
        average = {key: t.clone() for key, t in live.items()}
        self.average = {name: average[id(tensors[name])] for name in self.tensors}  # this process's part of them
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._live, self._average = list(live.values()), list(average.values())

    @abstractmethod
    def update(self, step: int) -> None:
        """Called after update number `step`."""

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Go this share of the way towards the weights of now."""
        torch._foreach_lerp_(self._average, self._live, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages inside this block."""
        with torch.no_grad():
            kept = [t.clone() for t in self._live]
            torch._foreach_copy_(self._live, self._average)
        self.gather_anew()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, kept)
            self.gather_anew()

    def gather_anew(self) -> None:
        """FSDP may keep what it gathered for the last forward."""
        for module in self._sharded:
            module.reshard()

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        """All that the model's own state dict holds, averaged, in CPU memory. Where weights are sharded every
        process calls it, and those that do not keep it get nothing."""
        parts = {name: (t, self.tensors[name]) for name, t in self.average.items()}
        parts |= {name: (t, t) for name, t in self.copied.items()}
        tensors = ((name, whole(*part)) for name, part in parts.items())  # one at a time
        form = torch.contiguous_format
        return {name: t.to("cpu", copy=True, memory_format=form) for name, t in tensors if keep}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.average.items():
            tensor.copy_(part(distributed(state[name], self.tensors[name])))


class WeightAverage(AveragedWeights):
    """Exponential moving average (Polyak & Juditsky 1992), moved at every step.

    The decay grows as (1 + step) / (10 + step) up to its value, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    def update(self, step: int) -> None:
        self.move(1 - min(self.decay, (1 + step) / (10 + step)))
