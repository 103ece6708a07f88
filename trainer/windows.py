"""From a loader's micro-batches to the windows of optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from configs.errors import ConfigError
from data.batch_sizes import BatchSizes
from trainer.processes import precise

Batch = dict[str, Any]


@runtime_checkable
class PositionedLoader(Protocol):
    """A loader that can begin anywhere. Any other iterable of batches works too, and is skipped through."""

    steps_per_epoch: int

    def set_position(self, epoch: int, step_in_epoch: int) -> None: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass
class Window:
    """The micro-batches of one optimizer step, and which of them `optimize` is at."""

    batches: list[Batch]
    counts: list[Any]  # what each one's mean loss is a mean over
    total: Any  # the sum of counts over all processes
    number: int = 0

    def share(self, processes: int, dtype: torch.dtype) -> Any:
        """What the micro-batch's mean loss weighs in the window's, times the processes, since DDP takes their mean."""
        count, total = self.counts[self.number], self.total
        if not isinstance(total, Tensor):
            return count * processes / (total or 1)
        total = total.to(precise(total.device))
        return (count * processes / torch.where(total == 0, 1, total)).to(dtype)

    @property
    def is_last(self) -> bool:
        return self.number == len(self.batches) - 1


NO_WINDOW = Window([], [], 0)


def as_dict(item: Any) -> Batch:
    """An (images, labels) pair as a batch; a dict is one already."""
    if isinstance(item, dict):
        return dict(item)
    images_BCHW, labels = item
    return {"images_BCHW": images_BCHW, "labels": labels}


def samples_in(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def grouped(loader: Iterable[Any], samples_per_window: int) -> Iterator[list[Batch]]:
    """Micro-batches, as many as make up a window; the last window may have fewer."""
    batches: list[Batch] = []
    samples = 0
    for item in loader:
        batch = as_dict(item)
        batches.append(batch)
        samples += samples_in(batch)
        if samples >= samples_per_window:
            yield batches
            batches, samples = [], 0
    if batches:
        yield batches


class EpochLengths:
    """Optimizer steps of each epoch. Raises ConfigError where the loader does not tell what is needed."""

    def __init__(self, loader: Any, batch_sizes: BatchSizes, processes: int, max_steps: int | None):
        self.steps_of = getattr(loader, "steps_of", None) if batch_sizes.later else None
        if batch_sizes.later and self.steps_of is None:
            raise ConfigError("--batch_size_schedule needs a loader that forms the batches itself, as data/loader.py's")
        self.steps = 0 if self.steps_of else count_steps(loader, batch_sizes.first // processes, max_steps)

    def of(self, epoch: int) -> int:
        return self.steps_of(epoch) if self.steps_of else self.steps

    def total(self, epochs: int) -> int:
        return sum(map(self.of, range(epochs))) if self.steps_of else self.steps * epochs


def count_steps(loader: Iterable[Any] | None, samples_per_window: int, max_steps: int | None) -> int:
    """Optimizer steps of an epoch. Raises ConfigError where the loader does not tell."""
    if loader is None:
        return 1
    if isinstance(loader, PositionedLoader):
        return loader.steps_per_epoch
    if isinstance(loader, (list, tuple)):
        return max(1, sum(1 for _ in grouped(loader, samples_per_window)))
    micro_batch = getattr(loader, "batch_size", None)  # a torch DataLoader
    if micro_batch and isinstance(loader, Sized):
        with suppress(TypeError):  # over an iterable dataset it has no length
            return -(-len(loader) // -(-samples_per_window // micro_batch))
    if max_steps:
        return max_steps
    raise ConfigError("the train_loader does not tell how long an epoch is", fix="give --max_steps")
