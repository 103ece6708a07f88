"""Object detection: boxes and their classes, measured by COCO's mean average precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, make_grid

from trainer import reporting
from trainer.detection_metrics import DetectionMetrics, check_installed
from trainer.losses import Criterion, Losses
from trainer.main_trainer import MainTrainer
from trainer.windows import Batch

SHOWN = 8  # validation images that trackers see
LEAST_SCORE = 0.3  # of the boxes that are drawn


class DetectionTrainer(MainTrainer):
    """Batches of images_BCHW, boxes_BM4 and labels_BM, a detector that knows its losses (models/detection.py)."""

    kinds = ("boxes",)
    default_model = "small_fcos"
    default_monitor = "map"
    usage = "found = model(images)[1]  # of each image boxes xyxy [n, 4] in its pixels, scores [n], labels [n]"
    first: tuple[Any, Batch] | None = None  # predictions and batch that an evaluation began with

    def __init__(self, config: Any, model: Any, train_loader: Any = None, val_loader: Any = None, **options: Any):
        if val_loader is not None:
            check_installed()
        super().__init__(config, model, train_loader, val_loader, **options)

    def get_criterion(self) -> Criterion:
        return {}  # the model's own

    def forward_pass(self, batch: Batch) -> tuple[Losses, Any]:
        losses, detections = self.model(batch["images_BCHW"], batch["boxes_BM4"], batch["labels_BM"])
        if self.first is None and detections is not None and self.trackers:
            self.first = detections, batch
        return losses, detections

    @torch.no_grad()
    def validate_epoch(self, val_loader: Iterable[Any]) -> dict[str, float]:
        self.first = None
        found = super().validate_epoch(val_loader)
        if self.first is not None:
            reporting.track(self, {"val/detections": self.drawn(*self.first)})
        return found

    @torch.no_grad()
    def inference(self, inputs: Tensor) -> Any:
        """Boxes [n, 4] in pixels of the inputs, scores [n] and labels [n] for each image [C, H, W], uint8 or floats in
        0..1."""
        self.model.eval()
        with self.averaged():
            return self.model(inputs.to(self.device))[1]

    def as_rows(self, predictions: Any) -> list[dict[str, Any]]:
        """From the highest score on."""
        return [
            {
                "boxes": [[round(side, 2) for side in box] for box in found["boxes"].tolist()],
                "labels": [self.plain_model.classes[number] for number in found["labels"].tolist()],
                "scores": [round(score, 6) for score in found["scores"].tolist()],
            }
            for found in predictions
        ]

    def new_metrics(self) -> DetectionMetrics:
        return DetectionMetrics()

    def val_metric_names(self) -> list[str]:
        return [*DetectionMetrics.NAMES, *(["loss"] if self.plain_model.loss_in_evaluation else [])]

    def drawn(self, detections: Any, batch: Batch) -> Tensor:
        """The first images as one, uint8 [3, H, W]."""
        rows = self.as_rows(detections[:SHOWN])
        return make_grid([with_boxes(image, row) for image, row in zip(batch["images_BCHW"].cpu(), rows)], nrow=4)


def with_boxes(image_CHW: Tensor, row: dict[str, Any], least_score: float = LEAST_SCORE) -> Tensor:
    """A copy of an image uint8 with a row of `as_rows` drawn on it, [3, H, W]."""
    image_CHW = image_CHW.expand(3, -1, -1).contiguous()
    boxes = [box for box, score in zip(row["boxes"], row["scores"]) if score >= least_score]
    labels = [f"{label} {score:.2f}" for label, score in zip(row["labels"], row["scores"]) if score >= least_score]
    if not boxes:
        return image_CHW
    boxes_N4 = torch.tensor(boxes)
    boxes_N4[:, 2:] = boxes_N4[:, 2:].maximum(boxes_N4[:, :2])
    return draw_bounding_boxes(image_CHW, boxes_N4, labels, colors="red")
