"""Detectors: the table of names, and a small one of our own that learns on a CPU.

A detector is called with images alone, or with their boxes too:
`forward(images_BCHW, boxes_BM4=None, labels_BM=None) -> (losses, detections)`. Rows filled with -1 are no boxes.
In training, losses is a dict with "loss" and its parts, detections None; without boxes, detections are the raw outputs
of the heads, to be measured. In evaluation, losses is None where a detector tells none, and detections has a dict for
each image: boxes [n, 4] in pixels of the square, scores [n], labels [n] from the highest score on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import interpolate
from torchvision.ops import batched_nms, sigmoid_focal_loss

from models.base_model import BaseModel
from models.torchvision_detectors import TorchvisionDetector, torchvision_names

Outputs = tuple[dict[str, Tensor] | None, Any]

STRIDES = (8, 16, 32)  # pixels between the points of each level
LARGEST = (32.0, 80.0, math.inf)  # pixels: the longer side of a box that a level is for, at most
RADIUS = 0.75  # strides: points so near to the centre of a box learn it
CANDIDATES, DETECTIONS = 300, 100  # of an image, before and after boxes that overlap are left out
LEAST_SCORE, LARGEST_IOU = 0.05, 0.6


class SmallFCOS(BaseModel):
    """FCOS (Tian et al. 2019, https://arxiv.org/abs/1904.01355) in small, with GroupNorm: every point of three levels
    tells classes, the distances to the sides of a box, and how central it lies. A level is chosen by the box's size.

    The loss is a mean over images, each image's own being a sum over its points by its positive points (at least 1):
    no cut into micro-batches changes it. width: channels of the levels. depth: convolutions before the head.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 64, width: int = 64, depth: int = 2):
        super().__init__()
        self.num_classes = num_classes
        wide = 3 * width // 2
        self.stem = nn.Sequential(block(in_channels, width // 2, stride=2), block(width // 2, width, stride=2))
        self.stages = nn.ModuleList(
            [
                nn.Sequential(block(width, wide, stride=2), block(wide, wide)),
                nn.Sequential(block(wide, wide, stride=2)),
                nn.Sequential(block(wide, wide, stride=2)),
            ]
        )
        self.laterals = nn.ModuleList([nn.Conv2d(wide, width, 1) for _ in STRIDES])
        self.tower = nn.Sequential(*[block(width, width) for _ in range(depth)])
        self.head = nn.Conv2d(width, num_classes + 5, 3, padding=1)  # classes, left, top, right, bottom, centre

    @property
    def dim(self) -> int:
        return self.head.in_channels

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias[: self.num_classes], -math.log(99))  # every class at 1 % (Lin et al. 2017)

    def forward(self, images_BCHW: Tensor, boxes_BM4: Tensor | None = None, labels_BM: Tensor | None = None) -> Outputs:
        maps = self.maps(images_BCHW)
        if self.training and boxes_BM4 is None:
            return None, maps
        points = Points(maps)
        outputs_BPK = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1).to(points.dtype)
        classes_BPC, distances_BP4, centre_BP = outputs_BPK.split([self.num_classes, 4, 1], 2)
        centre_BP = centre_BP.squeeze(2)
        boxes_BP4 = points.boxes(distances_BP4)
        losses = None
        if boxes_BM4 is not None and labels_BM is not None:
            losses = detection_losses(points, classes_BPC, boxes_BP4, centre_BP, boxes_BM4, labels_BM)
        if self.training:
            return losses, None
        scores_BPC = (classes_BPC.sigmoid() * centre_BP.sigmoid()[..., None]).sqrt()
        height, width = images_BCHW.shape[2:]
        return losses, [best(boxes, scores, height, width) for boxes, scores in zip(boxes_BP4, scores_BPC)]

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """The head's outputs [B, classes + 5, H, W] of each level."""
        features = self.stem(self.normalize(images_BCHW))
        levels = []
        for stage, lateral in zip(self.stages, self.laterals):
            features = stage(features)
            levels.append(lateral(features))
        for number in reversed(range(len(levels) - 1)):  # coarse levels tell finer ones (Lin et al. 2017, FPN)
            levels[number] = levels[number] + interpolate(levels[number + 1], size=levels[number].shape[2:])
        return [self.head(self.tower(level)) for level in levels]


def block(width_in: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(8, width),
        nn.ReLU(inplace=True),
    )


class Points:
    """The points of all levels: centres [P, 2] in pixels, the stride [P] of each, the box sizes it is for."""

    def __init__(self, maps: list[Tensor]):
        device = maps[0].device
        self.dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
        centres: list[Tensor] = []
        strides: list[Tensor] = []
        least: list[Tensor] = []
        largest: list[Tensor] = []
        for stride, low, high, level in zip(STRIDES, (0.0, *LARGEST), LARGEST, maps):
            rows, columns = (
                (torch.arange(side, device=device, dtype=self.dtype) + 0.5) * stride for side in level.shape[2:]
            )
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres.append(torch.stack([x.flatten(), y.flatten()], 1))
            for values, value in ((strides, stride), (least, low), (largest, high)):
                values.append(torch.full((x.numel(),), value, device=device, dtype=self.dtype))
        self.centres_P2, self.strides_P = torch.cat(centres), torch.cat(strides)
        self.least_P, self.largest_P = torch.cat(least), torch.cat(largest)

    def boxes(self, distances_BP4: Tensor) -> Tensor:
        """xyxy in pixels, of distances to the four sides as logarithms of two strides."""
        distances_BP4 = 2 * self.strides_P[:, None] * distances_BP4.clamp(-8, 8).exp()
        return torch.cat([self.centres_P2 - distances_BP4[..., :2], self.centres_P2 + distances_BP4[..., 2:]], 2)

    def matches(self, boxes_BM4: Tensor, labels_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Which points learn a box, bool [B, P], and which box, int64 [B, P]: of several the smallest. A box as small
        as a stride is widened to it, so that a point lies inside."""
        low_BM2, high_BM2 = boxes_BM4[..., :2], boxes_BM4[..., 2:]
        middle_BM2, sides_BM2 = (low_BM2 + high_BM2) / 2, high_BM2 - low_BM2
        offset_BPM2 = (self.centres_P2[None, :, None] - middle_BM2[:, None]).abs()
        strides_P1 = self.strides_P[:, None]
        reach_BPM2 = torch.minimum(
            torch.maximum(sides_BM2[:, None] / 2, strides_P1[..., None] / 2), RADIUS * strides_P1[..., None]
        )
        longer_BM = sides_BM2.amax(2)
        level_BPM = (longer_BM[:, None] > self.least_P[:, None]) & (longer_BM[:, None] <= self.largest_P[:, None])
        fits_BPM = (offset_BPM2 <= reach_BPM2).all(3) & level_BPM & (labels_BM[:, None] >= 0)
        areas_BPM = sides_BM2.prod(2)[:, None].where(fits_BPM, math.inf)
        smallest_BP, which_BP = areas_BPM.min(2)
        return smallest_BP < math.inf, which_BP


def detection_losses(
    points: Points, classes_BPC: Tensor, boxes_BP4: Tensor, centre_BP: Tensor, boxes_BM4: Tensor, labels_BM: Tensor
) -> dict[str, Tensor]:
    """Focal loss of the classes, generalised IoU of the boxes, cross-entropy of the centres. Nothing is indexed by what
    is found, so that the device is never waited for."""
    boxes_BM4 = boxes_BM4.to(points.dtype)
    positive_BP, which_BP = points.matches(boxes_BM4, labels_BM)
    wanted_BP4 = boxes_BM4.gather(1, which_BP[..., None].expand(-1, -1, 4))
    class_BP = labels_BM.gather(1, which_BP).clamp(min=0)
    wanted_BPC = functional.one_hot(class_BP, classes_BPC.shape[2]).to(points.dtype) * positive_BP[..., None]
    wanted_BP4 = wanted_BP4.where(positive_BP[..., None], boxes_BP4.detach())
    distances_BP4 = torch.cat([points.centres_P2 - wanted_BP4[..., :2], wanted_BP4[..., 2:] - points.centres_P2], 2)
    shorter, longer = (pick(distances_BP4.clamp(min=1e-3).unflatten(2, (2, 2)), 2) for pick in (torch.amin, torch.amax))
    centrality_BP = (shorter / longer).prod(2).sqrt()
    cross_entropy = functional.binary_cross_entropy_with_logits
    sums = {
        "class": sigmoid_focal_loss(classes_BPC, wanted_BPC, alpha=-1).sum(2),
        "box": generalized_iou_losses(boxes_BP4, wanted_BP4) * positive_BP,
        "centre": cross_entropy(centre_BP, centrality_BP, reduction="none") * positive_BP,
    }
    positives_B = positive_BP.sum(1).clamp(min=1)
    parts = {name: (values_BP.sum(1) / positives_B).mean() for name, values_BP in sums.items()}
    return {"loss": torch.stack(list(parts.values())).sum()} | {f"loss/{n}": part.detach() for n, part in parts.items()}


def generalized_iou_losses(found_BP4: Tensor, true_BP4: Tensor) -> Tensor:
    """[B, P], of boxes xyxy (Rezatofighi et al. 2019, https://arxiv.org/abs/1902.09630). torchvision's own picks out
    the pairs that overlap, for which a device has to be waited for, and which cannot be compiled."""
    low_BP2 = torch.maximum(found_BP4[..., :2], true_BP4[..., :2])
    high_BP2 = torch.minimum(found_BP4[..., 2:], true_BP4[..., 2:])
    around_BP4 = torch.cat(
        [torch.minimum(found_BP4[..., :2], true_BP4[..., :2]), torch.maximum(found_BP4[..., 2:], true_BP4[..., 2:])], 2
    )
    found_BP, true_BP, around_BP = map(area, (found_BP4, true_BP4, around_BP4))
    both_BP = (high_BP2 - low_BP2).clamp(min=0).prod(2)
    union_BP = found_BP + true_BP - both_BP
    return 1 - both_BP / (union_BP + 1e-7) + (around_BP - union_BP) / (around_BP + 1e-7)


def area(boxes_BP4: Tensor) -> Tensor:
    return (boxes_BP4[..., 2:] - boxes_BP4[..., :2]).prod(2)


@torch.compiler.disable  # how many are found is known only then
def best(boxes_P4: Tensor, scores_PC: Tensor, height: int, width: int) -> dict[str, Tensor]:
    """The detections of one image: of boxes of one class that overlap, the one with the highest score."""
    scores, places = scores_PC.flatten().topk(min(CANDIDATES, scores_PC.numel()))
    scores = scores[scores > LEAST_SCORE]
    places = places[: len(scores)]
    labels = places % scores_PC.shape[1]
    boxes = boxes_P4[places // scores_PC.shape[1]]
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    kept = batched_nms(boxes, scores, labels, LARGEST_IOU)[:DETECTIONS]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


# A detector of your own: one line here.
DETECTORS: dict[str, Callable[..., BaseModel]] = {"small_fcos": SmallFCOS}


def names() -> list[str]:
    return [*DETECTORS, *torchvision_names()]


def builder(name: str) -> Callable[..., BaseModel]:
    return DETECTORS.get(name, partial(TorchvisionDetector, name))
