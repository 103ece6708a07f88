"""Sums that become metrics: kept on the device until they are read, exact on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.errors import Diverged
from trainer.losses import Losses
from trainer.processes import Processes
from trainer.windows import Batch

Sums = dict[str, list[float]]  # name -> [sum over samples, samples]
CURE = (
    "under another --experiment_name: lower --lr, add --warmup_steps or --grad_clip, try bf16 for fp16; check the data"
)
Row = tuple[int, float, dict[str, float]]  # the step that it leads to, a count, means over it


def means(sums: Sums) -> dict[str, float]:
    return {name: value / count for name, (value, count) in sums.items() if count}


def together(rows: Iterable[Row]) -> list[Row]:
    """One row of each step, whatever micro-batches and processes it was cut into."""
    found: dict[int, tuple[float, dict[str, float]]] = {}
    for step, count, of_part in rows:
        total, sums = found.get(step, (0, {}))
        found[step] = total + count, {name: sums.get(name, 0.0) + value * count for name, value in of_part.items()}
    return [
        (step, count, {name: value / count if count else 0.0 for name, value in sums.items()})
        for step, (count, sums) in found.items()
    ]


class Meter:
    """Losses and hits since the last reading.

    `add` keeps small tensors and neither computes nor waits for the device. `read` waits once. Steps are added to the
    sums one by one, so that it does not matter to the last bit how often they are read.

    hits: from what was kept of each sample to the metrics' hits, bool [B] by name.
    gather: what each process says, in their order.
    """

    KEPT_ELEMENTS = 2**22  # then what was kept is reduced on the device, so that memory stays bounded

    def __init__(
        self,
        hits: Callable[..., dict[str, Tensor]] | None = None,
        gather: Callable[[Any], list[Any]] = lambda said: [said],
        *,
        finite_only: bool = False,
    ):
        self.hits, self.gather, self.finite_only = hits, gather, finite_only
        self._forget()

    def _forget(self) -> None:
        self.losses: list[tuple[Losses, Any, int]] = []
        self.kept: list[tuple[Tensor, ...]] = []
        self.kept_elements = self.samples = 0
        self.hit_sums: dict[str, Any] = {}

    def add(self, losses: Losses, count: Any, kept: tuple[Tensor, ...], step: int) -> None:
        """losses: means over `count`; kept: tensors [B, ...] that hits are found from; step: the one they lead to."""
        if isinstance(losses, dict):
            losses = {name: value.detach() for name, value in losses.items()}
        else:
            losses = losses.detach()
        self.losses.append((losses, count, step))
        if kept:
            self.kept.append(kept)
            self.kept_elements += kept[0].numel()
            if self.kept_elements > self.KEPT_ELEMENTS:
                self._find_hits()

    def _find_hits(self) -> None:
        if self.kept and self.hits is not None:
            for name, hits in self.hits(*map(torch.cat, zip(*self.kept))).items():
                self.hit_sums[name] = self.hit_sums.get(name, 0) + hits.sum()
            self.samples += sum(len(kept[0]) for kept in self.kept)
        self.kept, self.kept_elements = [], 0

    def rows(self) -> list[Row]:
        """Of each micro-batch that is pending; the host waits for the device here."""
        if not self.losses:
            return []
        named = [losses if isinstance(losses, dict) else {"loss": losses} for losses, _, _ in self.losses]
        columns = {name: torch.stack([losses[name] for losses in named]).tolist() for name in named[0]}
        return [
            (step, float(count), {name: column[place] for name, column in columns.items()})
            for place, (_, count, step) in enumerate(self.losses)
        ]

    def read(self, *sums: Sums) -> None:
        """Add what is pending on all processes to each of the sums and forget it.

        A loss that is not finite raises Diverged, or with finite_only all losses of its step count for nothing,
        however the step was cut into micro-batches and processes.
        """
        self._find_hits()
        mine = self.rows(), {name: float(hits) for name, hits in self.hit_sums.items()}, self.samples
        self._forget()
        rows_of, hits_of, samples_of = zip(*self.gather(mine))
        for step, count, of_step in together(row for rows in rows_of for row in rows):
            if wrong := [name for name, value in of_step.items() if not math.isfinite(value)]:
                if self.finite_only:
                    continue
                raise Diverged(f"{wrong[0]} is {of_step[wrong[0]]} at step {step}", fix=CURE)
            add_to(sums, {name: value * count for name, value in of_step.items()}, count)
        names = dict.fromkeys(name for hits in hits_of for name in hits)
        add_to(sums, {name: sum(hits.get(name, 0.0) for hits in hits_of) for name in names}, sum(samples_of))


def add_to(sums: Iterable[Sums], totals: dict[str, float], count: float) -> None:
    for target in sums:
        for name, total in totals.items():
            entry = target.setdefault(name, [0.0, 0])
            entry[0] += total
            entry[1] += count


class Metrics(Protocol):
    """What an evaluation finds, over every sample once."""

    def update(self, predictions: Any, batch: Batch) -> None:
        """Take in what `forward_pass` predicted for a batch."""

    def compute(self, processes: Processes | None = None) -> dict[str, float]:
        """The metrics over all processes, the same on each."""


class ClassificationMetrics:
    """accuracy, top5_accuracy (more than 5 classes) and macro f1 from counts per class, over every sample once."""

    def __init__(self, num_classes: int, device: torch.device):
        self.num_classes = num_classes
        self.counts = torch.zeros(4, num_classes, dtype=torch.int64, device=device)  # hits, top-5 hits, predicted, true

    @staticmethod
    def names(num_classes: int) -> tuple[str, ...]:
        return ("accuracy", "top5_accuracy", "f1") if num_classes > 5 else ("accuracy", "f1")

    def update(self, predictions: Tensor, batch: Batch) -> None:
        """predictions: logits [B, C]. Waits for nothing: a mask or bincount would have to know how many there are."""
        logits_BC = predictions
        labels_B: Tensor = batch["labels"]
        predicted_B = logits_BC.argmax(1)
        top5_B = (logits_BC.topk(min(5, self.num_classes), dim=1).indices == labels_B[:, None]).any(1)
        every_B = torch.ones_like(labels_B)
        for row, (classes_B, counted_B) in enumerate(
            ((labels_B, predicted_B == labels_B), (labels_B, top5_B), (predicted_B, every_B), (labels_B, every_B))
        ):
            self.counts[row].index_add_(0, classes_B, counted_B.to(self.counts.dtype))

    def compute(self, processes: Processes | None = None) -> dict[str, float]:
        """Classes that neither occur nor are predicted do not count in f1, as in scikit-learn."""
        counts = self.counts if processes is None or processes.reduce is None else processes.reduce(self.counts)
        if not counts[3].any():  # no sample has a label
            return {}
        hits, top5, predicted, true = counts.cpu().double()
        seen = (predicted + true) > 0
        f1 = (2 * hits / (predicted + true).clamp(min=1))[seen]
        metrics = {
            "accuracy": float(hits.sum() / true.sum()),
            "top5_accuracy": float(top5.sum() / true.sum()),
            "f1": float(f1.mean()),
        }
        return {name: metrics[name] for name in self.names(self.num_classes)}
