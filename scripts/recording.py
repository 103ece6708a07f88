"""What a replay watches a trainer by: the losses of a step, computed as the processes of the run did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError, UserError
from data.order import Draw, TrainOrder, even_parts
from scripts.wiring import Adapt
from trainer.base_trainer import BaseTrainer
from trainer.metrics import Sums, add_to, together
from trainer.windows import Batch, Window

NO_IDS = torch.empty(0, dtype=torch.int64)


@dataclass
class Step:
    """What one step computed."""

    epoch: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)  # of each micro-batch
    counts: list[float] = field(default_factory=list)
    window: Sums = field(default_factory=dict)  # since the log line before
    grad_norm: float = math.nan
    lr: float = math.nan
    ids: list[int] = field(default_factory=list)

    def means(self) -> dict[str, float]:
        """Losses of the whole batch."""
        total = sum(self.counts)
        return {
            name: sum(value * count for value, count in zip(row, self.counts)) / total
            for name, row in self.losses.items()
        }


def recording(number: int, window_start: int, processes: int) -> Adapt:
    """Makes of a task's trainer one that notes what the step computes, and leaves out what does not change it."""

    def adapt(task: type[BaseTrainer]) -> type[BaseTrainer]:
        class Recording(task):  # type: ignore[misc, valid-type]
            def __init__(self, *arguments: Any, **options: Any):
                super().__init__(*arguments, **options)
                self.of_others: dict[Tensor, Tensor] = {}  # gradients of the processes whose part is done
                self.watched: set[Tensor] = set()

            def micro_batches(self, window: Window) -> Iterator[Batch]:
                """Each process sums up its own gradients first: the order of sums decides their last bits."""
                each = len(window.batches) // processes
                for parameter in self.parameters if processes > 1 else ():  # a frozen body joins later
                    if parameter not in self.watched:
                        parameter.register_post_accumulate_grad_hook(self.add_others)
                        self.watched.add(parameter)
                for batch in super().micro_batches(window):
                    if window.number and window.number % each == 0:
                        for parameter in self.parameters:
                            if parameter.grad is not None:
                                done = self.of_others.get(parameter)
                                self.of_others[parameter] = parameter.grad if done is None else done + parameter.grad
                                parameter.grad = None
                    yield batch

            def add_others(self, parameter: Tensor) -> None:
                if self.window.is_last and parameter in self.of_others and parameter.grad is not None:
                    parameter.grad = self.of_others.pop(parameter) + parameter.grad

            def train_epochs(self) -> tuple[str, str]:
                self.recorded = Step()
                if self.state.step > window_start:  # begun within the window of the log line
                    self.recorded.window = {name: [*sums] for name, sums in self.state.window_sums.items()}
                return super().train_epochs()

            def after_step(self, bar: Any) -> bool:
                if self.state.step > window_start:
                    self.record(self.recorded)
                return super().after_step(bar)

            def record(self, step: Step) -> None:
                rows = [row for row in self.meter.rows() if row[0] == self.state.step]
                if not rows:
                    raise UserError(
                        f"--task {self.config.task} kept no losses of step {self.state.step}",
                        fix="in its train_epoch: self.meter.add(losses, count, kept, self.state.step + 1)",
                    )
                step.counts = [count for _, count, _ in rows]
                step.losses = {name: [values[name] for _, _, values in rows] for name in rows[0][2]}
                for _, count, of_step in together(rows):
                    if all(map(math.isfinite, of_step.values())):
                        add_to([step.window], {name: value * count for name, value in of_step.items()}, count)
                if self.state.step == number:
                    step.epoch, step.lr, step.grad_norm = self.state.epoch, self.lr, float(self.grad_norm)
                    step.ids = [place for batch in self.window.batches for place in batch.get("ids", NO_IDS).tolist()]

            def validate_epoch(self, val_loader: Any) -> dict[str, float]:
                if self.config.scheduler == "plateau":  # the one that listens to it
                    return super().validate_epoch(val_loader)
                return {self.monitor: 0.0}

            def save_checkpoint(self, *, regular: bool = True) -> None:
                if self.config.nonfinite == "rollback":  # there is something to go back to
                    super().save_checkpoint(regular=regular)

        return Recording

    return adapt


def cut_as_by(trainer: BaseTrainer, processes: int) -> None:
    """Let one process compute the micro-batches that so many processes did."""
    config, loader = trainer.config, trainer.train_loader
    trainer.state.processes = trainer.processes.number  # nothing changes: no line is to say so
    if config.batch_size % processes:
        raise ConfigError(f"--batch_size {config.batch_size} cannot have been shared by {processes} processes")
    order = loader.order  # type: ignore[union-attr]
    if isinstance(order, TrainOrder):
        order = AllProcesses(
            order.samples,
            seed=config.seed,
            batch_size=order.batch_sizes,
            micro_batch_size=config.micro_batch_size,
            processes=processes,
        )
        loader.order = loader.draws.order = order  # type: ignore[union-attr]
    else:
        order.micro_batch = even_parts(config.batch_size // processes, config.micro_batch_size)


class AllProcesses(TrainOrder):
    """The micro-batches of all processes, one process after the other within a step."""

    def __iter__(self) -> Iterator[Draw]:
        share = self.batch_size // self.processes
        for start in range(self.first_step * self.batch_size, self.steps_per_epoch * self.batch_size, share):
            for place in range(start, start + share, self.micro_batch):
                yield self.draw(self.epoch, place, min(place + self.micro_batch, start + share))
