"""Mean average precision as COCO defines it (Lin et al. 2014, https://arxiv.org/abs/1405.0312)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from trainer.processes import Processes
from trainer.windows import Batch


def check_installed() -> None:
    if find_spec("torchmetrics") is None or find_spec("faster_coco_eval") is None:
        raise UserError(
            "detection is measured by torchmetrics and faster-coco-eval, which are not installed",
            fix="pip install -e '.[detection]'",
        )


class DetectionMetrics:
    """map, map50 and map75 over every sample once; the intersections of boxes do not change with the square's aspect.

    Rows are gathered from all processes and sorted by sample, so that any number of processes computes the same.
    """

    NAMES = ("map", "map50", "map75")
    BOX = slice(3, 7)  # of a row: sample, class, score, box xyxy

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.true: list[Tensor] = []

    def update(self, predictions: list[dict[str, Tensor]], batch: Batch) -> None:
        labels_BM, boxes_BM4 = batch["labels_BM"], batch["boxes_BM4"]
        self.true.append(
            rows(
                batch["ids"][:, None].expand_as(labels_BM).flatten(),
                labels_BM.flatten(),
                torch.ones_like(labels_BM).flatten(),
                boxes_BM4.flatten(0, 1),
            )
        )  # with those that are none: a device need not be waited for
        for image, sample in zip(predictions, batch["ids"]):
            labels = image["labels"]
            self.found.append(rows(sample.expand_as(labels), labels, image["scores"], image["boxes"]))

    def compute(self, processes: Processes | None = None) -> dict[str, float]:
        from torchmetrics.detection import MeanAveragePrecision

        check_installed()
        found, true = self.of_all(self.found, processes), self.of_all(self.true, processes)
        true = true[true[:, 1] >= 0]
        metric = MeanAveragePrecision(backend="faster_coco_eval", sync_on_compute=False)
        metric.warn_on_many_detections = False
        samples = torch.cat([found[:, 0], true[:, 0]]).unique()
        found_by, true_by = by_sample(found, samples), by_sample(true, samples)
        metric.update([as_dict(one) for one in found_by], [as_dict(one) for one in true_by])
        result = metric.compute()
        # -1 stands for no box at all
        return {name: max(0.0, float(result[key])) for name, key in zip(self.NAMES, ("map", "map_50", "map_75"))}

    @staticmethod
    def of_all(parts: list[Tensor], processes: Processes | None) -> Tensor:
        """Rows float64 [N, 7] on the CPU, by sample."""
        device = processes.accelerator.device if processes is not None else None
        mine = torch.cat([torch.empty(0, 7, dtype=torch.float64, device=device), *parts])
        every = (mine if processes is None else processes.gather_rows(mine)).cpu()
        return every[every[:, 0].argsort(stable=True)]


def rows(samples: Tensor, labels: Tensor, scores: Tensor, boxes: Tensor) -> Tensor:
    """float64 [N, 7]: holds ids below 2**53 and every float32 as they are."""
    return torch.cat([torch.stack([samples, labels, scores], 1).double(), boxes.double()], 1)


def by_sample(table: Tensor, samples: Tensor) -> list[Tensor]:
    """The rows of each of some samples; both are sorted."""
    ends = torch.searchsorted(table[:, 0].contiguous(), samples, right=True).tolist()
    return [table[begin:end] for begin, end in zip([0, *ends], ends)]


def as_dict(table: Tensor) -> dict[str, Any]:
    """As torchmetrics takes it."""
    boxes, scores = table[:, DetectionMetrics.BOX].float(), table[:, 2].float()
    return {"boxes": boxes, "scores": scores, "labels": table[:, 1].long()}
