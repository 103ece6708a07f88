"""How pictures become a batch of uint8 squares: the model normalises them, on its device.

First the geometry (data/geometry.py), then a policy of torchvision v2, which draws from torch's generator: it is
seeded with the sample's key.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from configs.options import Config
from data.decode import crop_resized, decode
from data.geometry import SMALL, Geometry
from data.order import generator_kept, seed_cpu


@dataclass(frozen=True)
class Transform:
    """A pure function of pictures, labels and keys."""

    geometry: Geometry
    policy: v2.Transform | None = None
    rare_policy: v2.Transform | None = None  # for the classes of rare_C
    rare_C: np.ndarray | None = None  # bool [classes]

    def cut(
        self, picture: bytes | torch.Tensor, key: int, channels: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One picture as a square, uint8 [C, S, S], in out if that is given. Raises DataError if it is no picture."""
        plan = self.geometry.plan(key)
        if out is None:
            out = torch.empty((channels, self.geometry.size, self.geometry.size), dtype=torch.uint8)
        if isinstance(picture, bytes):
            decode(picture, "", channels, plan, out)
        else:
            crop_resized(picture, plan, out)
        if self.geometry.cut == "random":
            self.geometry.turn(out, key)
        return out

    def cut_all(self, images_BCHW: torch.Tensor) -> torch.Tensor | None:
        """The same for pictures of one size at once; None where each has a cut of its own."""
        if self.geometry.cut != "whole":
            return None
        size = [self.geometry.size] * 2
        if list(images_BCHW.shape[2:]) == size:
            return images_BCHW
        return vision.resize(images_BCHW, size, antialias=True)

    def augment(self, images_BCHW: torch.Tensor, labels: np.ndarray, keys: np.ndarray) -> torch.Tensor:
        """What follows the cut, each sample by its key; may change its input."""
        if self.geometry.cut == "whole":
            images_BCHW = self.geometry.move(images_BCHW, keys)
        if self.policy is None and self.rare_policy is None:
            return images_BCHW
        with generator_kept():
            for slot, key in enumerate(keys.tolist()):
                rare = self.rare_C is not None and self.rare_C[labels[slot]]
                policy = self.rare_policy if rare else self.policy
                if policy is not None:
                    seed_cpu(key)
                    images_BCHW[slot] = policy(images_BCHW[slot])
        return images_BCHW


def train_transform(
    config: Config, image_size: int, horizontal_flip: bool, rare_C: np.ndarray | None = None
) -> Transform:
    """Random crop and flip, then the policy of `--augment`, then random erasing."""
    geometry = eval_geometry(image_size)
    if config.augment != "none":
        geometry = (
            Geometry("whole", image_size, padding=max(1, image_size // 8), flip=horizontal_flip)
            if image_size <= SMALL
            else Geometry("random", image_size, flip=horizontal_flip)
        )
    policy = policy_of(config.augment, image_size, config.random_erasing)
    if rare_C is None or config.augment_rare == "none":
        return Transform(geometry, policy)
    return Transform(geometry, policy, policy_of(config.augment_rare, image_size, config.random_erasing), rare_C)


def policy_of(name: str, image_size: int, random_erasing: float) -> v2.Transform | None:
    steps: list[torch.nn.Module] = []
    if name == "autoaugment":
        small = image_size <= SMALL
        steps.append(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10 if small else v2.AutoAugmentPolicy.IMAGENET))
    elif name == "randaugment":
        steps.append(v2.RandAugment())
    elif name == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    if random_erasing:
        steps.append(v2.RandomErasing(random_erasing))
    return v2.Compose(steps) if steps else None


def eval_transform(image_size: int) -> Transform:
    return Transform(eval_geometry(image_size))


def eval_geometry(image_size: int) -> Geometry:
    """The whole small image, or the centre of a large one (7/8 of its shorter side)."""
    return Geometry("whole" if image_size <= SMALL else "centre", image_size)
