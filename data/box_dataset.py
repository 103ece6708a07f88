"""Pictures with boxes become squares: the boxes go with every crop, flip and resize.

A picture is squashed to the square --image_size x --image_size, its aspect with it; nothing is cut away in an
evaluation. In training, torchvision v2's transforms draw from torch's generator, seeded with the sample's key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from configs.errors import ConfigError
from configs.options import Config
from data.batches import PictureDataset, black
from data.boxes import Boxes, is_valid
from data.decode import crop_resized, decode
from data.geometry import Box, whole
from data.order import Draw, generator_kept, seed_cpu

CROP: dict[str, Any] = {"min_scale": 0.5, "sampler_options": [0.0, 1.0], "trials": 10}  # keeps the centre of a box
SMALLEST = 1.0  # pixels: a box with a shorter side is no longer learnt
ROOM = 2  # a picture that will be cropped is decoded at no less than so many times the square


@dataclass(frozen=True)
class BoxTransform:
    """A pure function of a picture, its boxes and its key."""

    size: int  # side of the square, pixels
    policy: v2.Transform | None = None
    erasing: v2.Transform | None = None

    def __call__(
        self, picture: bytes | torch.Tensor, label: Boxes, key: int, channels: int
    ) -> tuple[torch.Tensor, Boxes, tuple[int, int]]:
        """uint8 [C, S, S], the boxes in its pixels, and the picture's own height and width. Raises DataError if it is
        no picture."""
        plan = SizedPlan(self.size if self.policy is None else None, ROOM * self.size)
        if isinstance(picture, bytes):
            image_CHW = decode(picture, "", channels, plan)
        else:
            image_CHW = crop_resized(picture, plan).expand(channels, -1, -1)
        height, width = plan.size
        boxes_N4, classes_N = clipped(label, height, width)
        boxes_N4 *= torch.tensor([image_CHW.shape[2] / width, image_CHW.shape[1] / height]).repeat(2)
        if self.policy is None:
            return image_CHW, Boxes(boxes_N4.numpy(), classes_N.numpy()), plan.size
        with generator_kept():
            seed_cpu(key)
            image_CHW, boxes_N4, classes_N = self.augmented(image_CHW, boxes_N4, classes_N)
        return image_CHW, Boxes(boxes_N4.numpy(), classes_N.numpy()), plan.size

    def augmented(
        self, image_CHW: torch.Tensor, boxes_N4: torch.Tensor, classes_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self.policy is not None
        canvas = (int(image_CHW.shape[1]), int(image_CHW.shape[2]))
        sample: dict[str, Any] = {
            "image": tv_tensors.Image(image_CHW),
            "boxes": tv_tensors.BoundingBoxes(boxes_N4, format="XYXY", canvas_size=canvas),
            "labels": classes_N,
        }
        sample = self.policy(sample)
        image_CHW = sample["image"].as_subclass(torch.Tensor)
        if self.erasing is not None:
            image_CHW = self.erasing(image_CHW)
        return image_CHW, sample["boxes"].as_subclass(torch.Tensor), sample["labels"]


class SizedPlan:
    """The whole picture, at side x side, or reduced to a shorter side of `least`; remembers the picture's own size."""

    size: tuple[int, int]

    def __init__(self, side: int | None, least: int):
        self.side, self.least = side, least

    def __call__(self, height: int, width: int) -> tuple[Box, tuple[int, int]]:
        self.size = height, width
        if self.side is not None:
            return whole(height, width), (self.side, self.side)
        scale = min(1.0, self.least / min(height, width))
        return whole(height, width), (max(1, round(height * scale)), max(1, round(width * scale)))


def clipped(label: Boxes, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes [n, 4] inside the picture and their classes [n]; those outside of it are left out."""
    valid = is_valid(label.boxes_xyxy, width, height)
    boxes = label.boxes_xyxy[valid].clip(0, np.array([width, height, width, height], np.float32))
    return torch.from_numpy(boxes), torch.from_numpy(label.classes[valid])


class BoxDataset(PictureDataset):
    """Squares with boxes_BM4 in their pixels, and sizes_B2: height and width of the pictures themselves."""

    transform: BoxTransform

    def pictures(self, draw: Draw, labels: np.ndarray, faults: dict[int, str]) -> dict[str, Any]:
        size = self.transform.size
        images_BCHW = black((len(draw.ids), self.channels, size, size))
        sizes_B2 = torch.zeros(len(draw.ids), 2, dtype=torch.int64)

        def make(slot: int, key: int) -> None:
            picture = self.picture(draw, slot)
            images_BCHW[slot], labels[slot], own = self.transform(picture, labels[slot], key, self.channels)
            sizes_B2[slot] = torch.tensor(own)

        self.each(draw, labels, faults, make)
        self.blank_out(labels, faults)
        return {"images_BCHW": images_BCHW, "sizes_B2": sizes_B2}


class WithBoxes(torch.nn.Module):
    """A transform that needs a box, left out for pictures that have none."""

    def __init__(self, transform: v2.Transform):
        super().__init__()
        self.transform = transform

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        return self.transform(sample) if len(sample["labels"]) else sample


def train_box_transform(config: Config, image_size: int, horizontal_flip: bool, zoom: bool) -> BoxTransform:
    """`default`: zoom out, a crop that keeps boxes (Liu et al. 2016, https://arxiv.org/abs/1512.02325), and a flip,
    where the dataset allows them. Boxes come at 2/3 to twice their size: that is its scale jitter."""
    if config.augment not in ("none", "default"):
        raise ConfigError(
            f"--augment {config.augment} moves pixels and not the boxes with them", fix="--augment default, or none"
        )
    erasing = v2.RandomErasing(config.random_erasing) if config.random_erasing else None
    moves: list[Any] = []
    if config.augment == "default":
        moves += (
            [v2.RandomZoomOut(0, side_range=(1.0, 1.5), p=0.3), WithBoxes(v2.RandomIoUCrop(**CROP))] if zoom else []
        )
        moves += [v2.RandomHorizontalFlip()] if horizontal_flip else []
    resize = v2.Resize((image_size, image_size), antialias=True)
    return BoxTransform(image_size, v2.Compose([*moves, resize, v2.SanitizeBoundingBoxes(min_size=SMALLEST)]), erasing)


def eval_box_transform(image_size: int) -> BoxTransform:
    return BoxTransform(image_size)
