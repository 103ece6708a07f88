"""Stochastic weight averaging (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.options import Config
from trainer.device import moved_ahead
from trainer.ema import AveragedWeights, WeightAverage
from trainer.state import TrainState
from trainer.windows import PositionedLoader

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer


class EpochMean(AveragedWeights):
    """Equal mean of the weights at the ends of epochs.

    Until the first of these epochs has ended it is the weights themselves. `state` counts the epochs in it.
    """

    def __init__(self, model: nn.Module, start_epoch: int, state: TrainState):
        super().__init__(model)
        self.start_epoch, self.state = start_epoch, state

    def update(self, step: int) -> None:
        """No step but an epoch's last one counts: `add_epoch`."""

    def add_epoch(self) -> bool:
        """Take in the weights at the end of this epoch, once: an evaluation that was stopped is done again. True where
        there is a mean by now."""
        if self.state.averaged_epochs == self.state.epoch - self.start_epoch:
            self.move(1 / (self.state.averaged_epochs + 1))
            self.state.averaged_epochs += 1
        return self.state.averaged_epochs > 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        self.follow()
        with super().applied():
            yield

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        self.follow()
        return super().state_dict(keep=keep)

    def follow(self) -> None:
        if not self.state.averaged_epochs:
            self.take_over()

    @torch.no_grad()
    def take_over(self) -> None:
        """What the model holds now."""
        torch._foreach_copy_(self._average, self._live)


def averaged_weights(config: Config, model: nn.Module, state: TrainState) -> AveragedWeights | None:
    """The average that a config asks for."""
    if config.swa_start_epoch is not None:
        return EpochMean(model, config.swa_start_epoch, state)
    return WeightAverage(model, config.ema_decay) if config.ema_decay else None


def average_epoch(trainer: BaseTrainer) -> None:
    """Take in the weights at the end of an epoch, before it is evaluated; one that --max_steps cuts off has none.

    BatchNorm's statistics of the mean are no mean of statistics: they are measured in one more pass over the images
    of the epoch (section 3.2 of the paper).
    """
    state, loader = trainer.state, trainer.train_loader
    if not isinstance(trainer.ema, EpochMean) or loader is None:
        return
    if not (trainer.exhausted or state.step_in_epoch >= trainer.steps_per_epoch) or not trainer.ema.add_epoch():
        return
    if not has_statistics(trainer):
        return
    if isinstance(loader, PositionedLoader):
        loader.set_position(state.epoch, 0)
    measure_statistics(trainer, trainer.polled(loader))


def has_statistics(trainer: BaseTrainer) -> bool:
    """Whether they have to be measured for the mean."""
    return isinstance(trainer.ema, EpochMean) and bool(trainer.batch_statistics.running)


def measure_statistics(trainer: BaseTrainer, batches: Iterable[Any]) -> None:
    assert isinstance(trainer.ema, EpochMean)
    with trainer.ema.applied():
        moved = moved_ahead(batches, trainer.device, trainer.on_device)
        trainer.batch_statistics.measure(trainer.model, moved, trainer.forward_pass)
        trainer.ema.take_over()
