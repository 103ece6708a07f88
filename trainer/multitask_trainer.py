"""Several tasks on one backbone: a head, a loss and metrics for each label column; labels may be missing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from configs.errors import ConfigError, nearest
from trainer.losses import Criterion, Losses, combine
from trainer.main_trainer import MainTrainer
from trainer.metrics import Metrics
from trainer.processes import Processes
from trainer.targets import TARGETS, Target, target_of
from trainer.windows import Batch

LOG_VARIANCES = "log_variances"


class MultiTaskTrainer(MainTrainer):
    """Batches of images_BCHW and labels/<task>, a models.MultiHead."""

    kinds = ("several",)
    usage = "outputs = model(images)  # by task: logits, or numbers as (number - mean) / std, of model.labels"

    @classmethod
    def usual_monitor(cls, model: Any) -> str:
        """The metric of the first task."""
        name, facts = next(iter(model.labels["of"].items()))
        return f"{name}/{TARGETS[facts['kind']].monitor}"

    @cached_property
    def targets(self) -> dict[str, Target]:
        of = self.plain_model.labels["of"]
        return {name: target_of(facts, facts["classes"], self.device) for name, facts in of.items()}

    def get_criterion(self) -> Criterion:
        of = self.plain_model.labels["of"]
        if self.config.loss_weights != ("learnt",):
            self.loss_weights = fixed_weights(self.config.loss_weights, list(of))
        return {name: MeanOfLabelled(target, of[name]["share"]) for name, target in self.targets.items()}

    def forward_pass(self, batch: Batch) -> tuple[Losses, Any]:
        outputs = self.model(batch["images_BCHW"])
        labels = {name: batch[f"labels/{name}"] for name in self.targets}
        if LOG_VARIANCES not in outputs:
            return combine(self.criterion, outputs, labels, self.loss_weights), outputs
        log_variances = dict(zip(self.targets, outputs[LOG_VARIANCES].unbind()))
        weights: Any = {
            name: self.targets[name].uncertainty_factor * (-value).exp() for name, value in log_variances.items()
        }
        losses = combine(self.criterion, outputs, labels, weights)
        assert isinstance(losses, dict)
        losses["loss"] = losses["loss"] + sum(log_variances.values()) / 2
        return losses | {f"weight/{name}": weight.detach() for name, weight in weights.items()}, outputs

    @torch.no_grad()
    def inference(self, inputs: Tensor) -> dict[str, Tensor]:
        """Of images [B, C, H, W], uint8 or floats in 0..1: each task's probabilities [B, classes] or numbers [B]."""
        self.model.eval()
        with self.averaged():
            outputs = self.model(inputs.to(self.device))
        return {name: target.predicted(outputs[name]) for name, target in self.targets.items()}

    def as_rows(self, predictions: dict[str, Tensor]) -> list[dict[str, Any]]:
        parts = [target.rows(predictions[name], name) for name, target in self.targets.items()]
        return [{key: value for part in row for key, value in part.items()} for row in zip(*parts)]

    def new_metrics(self) -> Metrics:
        return SeveralMetrics(self.targets)

    def val_metric_names(self) -> list[str]:
        return ["loss"] + [f"{name}/{one}" for name, target in self.targets.items() for one in target.metric_names()]


@dataclass
class MeanOfLabelled:
    """The sum of the losses of samples with a label, divided by all samples times `share`, that of the training samples
    with one: on average the mean over those. So it is a mean over samples, whatever is missing in which micro-batch."""

    target: Target
    share: float

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        known_B = self.target.known(labels)
        filled = torch.where(known_B.reshape(-1, *[1] * (labels.ndim - 1)), labels, 0)  # a loss of NaN has no gradient
        return torch.where(known_B, self.target.losses(outputs, filled), 0).mean() / self.share


class SeveralMetrics:
    """Each task's metrics under its name, over the samples that have its label."""

    def __init__(self, targets: dict[str, Target]):
        self.targets = targets
        self.metrics = {name: target.new_metrics() for name, target in targets.items()}

    def update(self, predictions: dict[str, Tensor], batch: Batch) -> None:
        for name, metrics in self.metrics.items():
            labels = batch[f"labels/{name}"]
            known_B = self.targets[name].known(labels)
            metrics.update(predictions[name][known_B], {"labels": labels[known_B]})

    def compute(self, processes: Processes | None = None) -> dict[str, float]:
        found = {name: metrics.compute(processes) for name, metrics in self.metrics.items()}
        return {f"{name}/{metric}": value for name, values in found.items() for metric, value in values.items()}


def fixed_weights(words: tuple[str, ...], tasks: list[str]) -> dict[str, float]:
    """Of `NAME=NUMBER`; 1 for the others. Raises ConfigError for a name that is no task."""
    given = {name: float(number) for name, _, number in (word.rpartition("=") for word in words)}
    if unknown := [name for name in given if name not in tasks]:
        raise ConfigError(f"--loss_weights names {unknown[0]}, which is no task", fix=nearest(unknown[0], tasks))
    return dict.fromkeys(tasks, 1.0) | given
