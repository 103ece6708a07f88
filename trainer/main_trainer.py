"""MainTrainer: the standard loop, and image classification: one class, several, or a number (trainer/targets.py).

Other tasks override get_criterion and forward_pass."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainer.base_trainer import BaseTrainer
from trainer.device import moved_ahead
from trainer.losses import Criterion, Losses, combine
from trainer.metrics import Meter, Metrics, Sums, means
from trainer.mixing import mix_pairs
from trainer.progress import Clock, EpochBar
from trainer.targets import TARGETS, Target, target_of
from trainer.windows import Batch


class MainTrainer(BaseTrainer):
    """Classification: batches of images_BCHW and labels [B], a model that returns logits [B, classes]."""

    kinds: tuple[str, ...] = ("classes", "multi_label", "numbers")

    @classmethod
    def usual_monitor(cls, model: Any) -> str:
        kind = getattr(model, "labels", {}).get("kind", "classes")
        return TARGETS[kind].monitor if kind in TARGETS and kind != "classes" else cls.default_monitor

    @cached_property
    def target(self) -> Target:
        """What the outputs are compared with."""
        model = self.plain_model
        return target_of(model.labels, model.classes, self.device, label_smoothing=self.config.label_smoothing)

    def get_criterion(self) -> Criterion:
        return self.target.criterion()

    def forward_pass(self, batch: Batch) -> tuple[Losses, Any]:
        images_BCHW, targets = self.mixed(batch)
        logits_BC = self.model(images_BCHW)
        return combine(self.criterion, logits_BC, targets, self.loss_weights), logits_BC

    def train_epoch(self, train_loader: Iterable[Any]) -> dict[str, float]:
        self.model.train()
        self.clock = Clock()
        bar = EpochBar(
            self.state.epoch, self.epochs, self.steps_per_epoch, self.state.step_in_epoch, shown=self.is_main
        )
        for window in self.windows(train_loader):  # the micro-batches of one optimizer step
            for batch in self.micro_batches(window):
                losses, predictions = self.forward_pass(batch)
                self.meter.add(losses, window.counts[window.number], self.kept(predictions, batch), self.state.step + 1)
                self.optimize(losses)
            if self.after_step(bar):
                break
        bar.close()
        self.meter.read(self.state.window_sums, self.state.epoch_sums)
        return means(self.state.epoch_sums)

    @torch.no_grad()
    def validate_epoch(self, val_loader: Iterable[Any]) -> dict[str, float]:
        self.model.eval()
        meter, sums, metrics = Meter(None, self.processes.told_by_all), Sums(), self.new_metrics()
        with self.averaged():
            for batch in moved_ahead(self.polled(val_loader), self.device, self.on_device):
                losses, predictions = self.forward_pass(batch)
                if losses is not None:
                    meter.add(losses, self.counted(batch), (), self.state.step)
                if "valid" not in batch:
                    metrics.update(predictions, batch)
        meter.read(sums)
        return means(sums) | metrics.compute(self.processes)

    @torch.no_grad()
    def inference(self, inputs: Tensor) -> Any:
        """Of images [B, C, H, W], uint8 or floats in 0..1: class probabilities [B, classes], or numbers [B]."""
        self.model.eval()
        with self.averaged():
            return self.target.predicted(self.model(inputs.to(self.device)))

    def as_rows(self, predictions: Any) -> list[dict[str, Any]]:
        return self.target.rows(predictions)

    def new_metrics(self) -> Metrics:
        """What an evaluation counts, besides the losses."""
        return self.target.new_metrics()

    def kept(self, predictions: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Nothing where batches have no `labels`: losses alone then tell how training goes."""
        return (predictions.detach(), batch["labels"]) if "labels" in batch else ()

    def hits(self, *kept: Any) -> dict[str, Tensor]:
        """Which samples were right; under MixUp the label is the sample's own."""
        return self.target.hits(*kept)

    def val_metric_names(self) -> list[str]:
        return ["loss", *self.target.metric_names()]

    def mixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and labels, or in training mixed images and soft targets."""
        config = self.config
        off = config.mix_off_epoch is not None and self.state.epoch >= config.mix_off_epoch
        if not self.model.training or off or not (config.mixup or config.cutmix):
            return batch["images_BCHW"], batch["labels"]
        return mix_pairs(
            batch["images_BCHW"],
            batch["labels"],
            num_classes=len(self.plain_model.classes),
            mixup=config.mixup,
            cutmix=config.cutmix,
            seed=config.seed,
            step=self.state.step,
            offset=batch["offset"],
            batch_size=self.batch_size,
        )

    @property
    def epochs(self) -> int | None:
        return None if self.config.max_steps else self.config.epochs
