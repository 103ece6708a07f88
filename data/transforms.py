"""torchvision v2 transforms, uint8 in and uint8 out: the model normalises, on its device.

A transform draws from torch's generator only; the dataset seeds it with the sample's key.
"""

from __future__ import annotations

import torch
from torchvision.transforms import v2

from configs.options import Config

SMALL = 64  # pixels; up to here images are padded and shifted, above they are cropped at random scales


def train_transform(config: Config, image_size: int, horizontal_flip: bool) -> v2.Transform | None:
    """Random crop and flip, then the policy of `--augment`, then random erasing; None changes nothing."""
    if config.augment == "none":
        steps = eval_steps(image_size)
    elif image_size <= SMALL:
        steps = [
            v2.Resize((image_size, image_size)),
            v2.RandomCrop(image_size, padding=max(1, image_size // 8)),
        ]
    else:
        steps = [v2.RandomResizedCrop(image_size)]
    if config.augment != "none" and horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.augment == "autoaugment":
        policy = v2.AutoAugmentPolicy.CIFAR10 if image_size <= SMALL else v2.AutoAugmentPolicy.IMAGENET
        steps.append(v2.AutoAugment(policy))
    elif config.augment == "randaugment":
        steps.append(v2.RandAugment())
    elif config.augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    if config.random_erasing:
        steps.append(v2.RandomErasing(config.random_erasing))
    return v2.Compose(steps)


def eval_transform(image_size: int) -> v2.Transform:
    """The whole small image, or the centre of a large one (7/8 of its shorter side)."""
    return v2.Compose(eval_steps(image_size))


def eval_steps(image_size: int) -> list[torch.nn.Module]:
    if image_size <= SMALL:
        return [v2.Resize((image_size, image_size))]
    return [v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size)]
