"""Sums that become metrics: kept on the device until they are read, exact on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs.errors import Diverged
from trainer.losses import Losses

Sums = dict[str, list[float]]  # name -> [sum over samples, samples]
Reduce = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes


def means(sums: Sums) -> dict[str, float]:
    return {name: value / count for name, (value, count) in sums.items() if count}


class Meter:
    """Losses and hits since the last reading.

    `add` keeps small tensors and never waits for the device. `read` waits once. Each loss is added to the sums
    one by one, so that it does not matter to the last bit how often they are read.
    """

    def __init__(self, reduce: Reduce | None = None):
        self.reduce = reduce
        self.pending: list[tuple[Losses, Any, dict[str, Tensor], int]] = []

    def add(self, losses: Losses, count: Any, hits: dict[str, Tensor], step: int) -> None:
        """losses: means over `count`; hits: bool [B] by metric name; step: the one that they lead to."""
        detached = (
            {name: value.detach() for name, value in losses.items()} if isinstance(losses, dict) else losses.detach()
        )
        self.pending.append((detached, count, hits, step))

    def read(self, *sums: Sums) -> None:
        """Add what is pending to each of the sums and forget it. Raises Diverged on a loss that is not finite."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        counts = [count.item() if isinstance(count, Tensor) else count for _, count, _, _ in pending]
        first = pending[0][0]
        names = list(first) if isinstance(first, dict) else ["loss"]
        columns = [
            torch.stack([losses[name] if isinstance(losses, dict) else losses for losses, _, _, _ in pending]).float()
            for name in names
        ]
        hit_names = list(pending[0][2])
        hits = [torch.cat([entry[2][name] for entry in pending]).sum() for name in hit_names]
        samples = sum(len(next(iter(entry[2].values()))) for entry in pending) if hit_names else 0
        if self.reduce is None:
            values = [column.tolist() for column in columns]
            totals = [float(hit) for hit in hits]
        else:
            device = columns[0].device
            share = torch.tensor(counts, dtype=torch.float32, device=device)
            rows = torch.stack([column * share for column in columns] + [share])
            tail = torch.stack([*hits, torch.tensor(samples, device=device)]).float()
            *values, counts = self.reduce(rows).tolist()
            values = [[value / count if count else 0.0 for value, count in zip(row, counts)] for row in values]
            *totals, samples = self.reduce(tail).tolist()
        self._refuse_non_finite(names, values, pending)
        for target in sums:
            for name, row in zip(names, values):
                entry = target.setdefault(name, [0.0, 0])
                for value, count in zip(row, counts):
                    entry[0] += value * count
                    entry[1] += count
            for name, hit in zip(hit_names, totals):
                entry = target.setdefault(name, [0.0, 0])
                entry[0] += hit
                entry[1] += samples

    @staticmethod
    def _refuse_non_finite(names: list[str], values: list[list[float]], pending: list[Any]) -> None:
        for name, row in zip(names, values):
            for value, entry in zip(row, pending):
                if not math.isfinite(value):
                    raise Diverged(
                        f"{name} is {value} at step {entry[3]}",
                        fix="lower --lr, add --warmup_steps or --grad_clip; with fp16 try bf16; look for NaN in the data",
                    )


class ClassificationMetrics:
    """accuracy, top5_accuracy (more than 5 classes) and macro f1 from counts per class, over every sample once."""

    def __init__(self, num_classes: int, device: torch.device):
        self.num_classes = num_classes
        self.counts = torch.zeros(4, num_classes, dtype=torch.int64, device=device)  # hits, top-5 hits, predicted, true

    @staticmethod
    def names(num_classes: int) -> tuple[str, ...]:
        return ("accuracy", "top5_accuracy", "f1") if num_classes > 5 else ("accuracy", "f1")

    def update(self, logits_BC: Tensor, labels_B: Tensor) -> None:
        predicted_B = logits_BC.argmax(1)
        top5_B = (logits_BC.topk(min(5, self.num_classes), dim=1).indices == labels_B[:, None]).any(1)
        for row, classes in enumerate((labels_B[predicted_B == labels_B], labels_B[top5_B], predicted_B, labels_B)):
            self.counts[row] += torch.bincount(classes, minlength=self.num_classes)

    def compute(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Classes that neither occur nor are predicted do not count in f1, as in scikit-learn."""
        counts = self.counts if reduce is None else reduce(self.counts)
        hits, top5, predicted, true = counts.cpu().double()
        seen = (predicted + true) > 0
        f1 = (2 * hits / (predicted + true).clamp(min=1))[seen]
        metrics = {
            "accuracy": float(hits.sum() / true.sum()),
            "top5_accuracy": float(top5.sum() / true.sum()),
            "f1": float(f1.mean()),
        }
        return {name: metrics[name] for name in self.names(self.num_classes)}
