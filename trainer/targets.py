"""What a head's outputs are compared with: the loss, the metrics and the predictions of each kind of labels.

A model says what its outputs stand for (`model.labels`, from data/described.py), so that training, testing and
predicting agree.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.losses import Loss
from trainer.metrics import ClassificationMetrics, Metrics
from trainer.row_metrics import RowMetrics, multi_label_metrics, number_metrics


class Target(Protocol):
    """Outputs [B, K] of a head, and labels [B] or [B, K]."""

    monitor: str  # the metric that usually decides what is best
    uncertainty_factor: float  # of a loss under learnt weights, https://arxiv.org/abs/1705.07115

    def __init__(self, classes: list[str], facts: dict[str, Any], label_smoothing: float, device: torch.device): ...

    def criterion(self) -> Loss:
        """The mean loss over samples."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[B], of labels that are known."""

    def known(self, labels: Tensor) -> Tensor:
        """Which labels are not missing, bool [B]."""

    def metric_names(self) -> list[str]: ...

    def new_metrics(self) -> Metrics: ...

    def hits(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Training metrics: bool [B] by name."""

    def predicted(self, outputs: Tensor) -> Tensor:
        """Probabilities [B, K], or numbers [B] in the labels' units."""

    def rows(self, predicted: Tensor, name: str | None = None) -> list[dict[str, Any]]:
        """What is written of each sample; name: of one of several tasks."""


class OneClass:
    """Logits [B, C] and class numbers int64 [B]; -1 is missing."""

    monitor = "accuracy"
    uncertainty_factor = 1.0

    def __init__(self, classes: list[str], facts: dict[str, Any], label_smoothing: float, device: torch.device):
        self.classes, self.label_smoothing, self.device = classes, label_smoothing, device
        self.weights_C = torch.tensor(facts["weights"], device=device) if "weights" in facts else None

    def criterion(self) -> Loss:
        if self.weights_C is None:
            return nn.CrossEntropyLoss(label_smoothing=self.label_smoothing)
        return lambda outputs, labels: self.losses(outputs, labels).mean()

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        weights_C = self.weights_C.to(outputs.dtype) if self.weights_C is not None else None
        return F.cross_entropy(outputs, labels, weights_C, reduction="none", label_smoothing=self.label_smoothing)

    def known(self, labels: Tensor) -> Tensor:
        return labels >= 0

    def metric_names(self) -> list[str]:
        return list(ClassificationMetrics.names(len(self.classes)))

    def new_metrics(self) -> Metrics:
        return ClassificationMetrics(len(self.classes), self.device)

    def hits(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"accuracy": outputs.argmax(1) == labels}

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1)

    def rows(self, predicted: Tensor, name: str | None = None) -> list[dict[str, Any]]:
        label, probability = (name, f"{name}_probability") if name else ("label", "probability")
        highest_B, classes_B = (values.tolist() for values in predicted.max(1))
        return [
            {label: self.classes[number], probability: round(value, 6)} for value, number in zip(highest_B, classes_B)
        ]


class AnyClasses:
    """Logits [B, C] and labels [B, C] of 0 and 1; -1 is missing. A class is predicted from a probability of 0.5 on."""

    monitor = "map"
    uncertainty_factor = 1.0

    def __init__(self, classes: list[str], facts: dict[str, Any], label_smoothing: float, device: torch.device):
        self.classes, self.device = classes, device
        self.weights_C = torch.tensor(facts["weights"], device=device) if "weights" in facts else None

    def criterion(self) -> Loss:
        return lambda outputs, labels: self.losses(outputs, labels).mean()

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        weights_C = self.weights_C.to(outputs.dtype) if self.weights_C is not None else None
        targets = labels.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none", pos_weight=weights_C).mean(1)

    def known(self, labels: Tensor) -> Tensor:
        return labels[:, 0] >= 0

    def metric_names(self) -> list[str]:
        return ["map", "f1", "accuracy"]

    def new_metrics(self) -> Metrics:
        return RowMetrics(multi_label_metrics, len(self.classes), self.device)

    def hits(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"accuracy": ((outputs > 0) == (labels > 0)).all(1)}

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def rows(self, predicted: Tensor, name: str | None = None) -> list[dict[str, Any]]:
        labels, probabilities = (name, f"{name}_probabilities") if name else ("labels", "probabilities")
        found = [[(c, p) for c, p in zip(self.classes, row) if p > 0.5] for row in predicted.tolist()]
        return [{labels: [c for c, _ in row], probabilities: [round(p, 6) for _, p in row]} for row in found]


class Number:
    """Outputs [B, 1] and numbers [B]; NaN is missing. The outputs are (number - mean) / std of the training labels."""

    monitor = "mae"
    uncertainty_factor = 0.5

    def __init__(self, classes: list[str], facts: dict[str, Any], label_smoothing: float, device: torch.device):
        (self.name,), self.mean, self.std, self.device = classes, facts["mean"], facts["std"], device

    def criterion(self) -> Loss:
        return lambda outputs, labels: self.losses(outputs, labels).mean()

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs[:, 0] - (labels.to(outputs.dtype) - self.mean) / self.std) ** 2

    def known(self, labels: Tensor) -> Tensor:
        return labels.isfinite()

    def metric_names(self) -> list[str]:
        return ["mae", "rmse", "r2"]

    def new_metrics(self) -> Metrics:
        return RowMetrics(lambda outputs, labels: number_metrics(self.predicted(outputs), labels[:, 0]), 1, self.device)

    def hits(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {}

    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs[:, 0] * self.std + self.mean

    def rows(self, predicted: Tensor, name: str | None = None) -> list[dict[str, Any]]:
        return [{self.name: float(f"{number:.6g}")} for number in predicted.tolist()]


TARGETS: dict[str, type[Target]] = {"classes": OneClass, "multi_label": AnyClasses, "numbers": Number}


def target_of(
    facts: dict[str, Any], classes: list[str], device: torch.device, *, label_smoothing: float = 0.0
) -> Target:
    """facts: the model's `labels`, or those of one of its heads; a model without any knows one class a picture."""
    return TARGETS[facts.get("kind", "classes")](classes, facts, label_smoothing, device)
