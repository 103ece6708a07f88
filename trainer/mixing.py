"""MixUp and CutMix on pairs: samples 2i and 2i+1 of the global batch are mixed with each other, both ways.

Pairs and their parameters follow from the seed, the step and the pair's place, so neither the micro-batch size
nor the number of processes changes them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.order import Use, mix
from trainer.device import sent


def mix_pairs(
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    num_classes: int,
    mixup: float,
    cutmix: float,
    seed: int,
    step: int,
    offset: int,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Mixed images, float in 0..1, and soft targets [B, num_classes].

    offset: place of the first sample in the global batch of `batch_size`. An odd last sample stays as it is.
    """
    images_BCHW = images_BCHW.float() / 255 if images_BCHW.dtype == torch.uint8 else images_BCHW
    targets_BC = torch.nn.functional.one_hot(labels_B, num_classes).to(images_BCHW.dtype)
    pairs = len(images_BCHW) // 2
    if not pairs:
        return images_BCHW, targets_BC
    share_P, box_P4 = draw(
        pairs, images_BCHW.shape[-2:], mixup, cutmix, mix(seed, Use.MIXING, step), offset, batch_size
    )
    share_P, box_P4 = sent(share_P, images_BCHW.device), sent(box_P4, images_BCHW.device)
    kept_B1HW = (
        kept_shares(share_P, box_P4, images_BCHW.shape[-2:]).repeat_interleave(2, 0)[:, None].to(images_BCHW.dtype)
    )
    share_B1 = share_P.repeat_interleave(2)[:, None].to(images_BCHW.dtype)
    even = images_BCHW[: 2 * pairs]
    partner = even.unflatten(0, (pairs, 2)).flip(1).flatten(0, 1)
    other_BC = targets_BC[: 2 * pairs].unflatten(0, (pairs, 2)).flip(1).flatten(0, 1)
    images = even * kept_B1HW + partner * (1 - kept_B1HW)
    targets = targets_BC[: 2 * pairs] * share_B1 + other_BC * (1 - share_B1)
    return torch.cat([images, images_BCHW[2 * pairs :]]), torch.cat([targets, targets_BC[2 * pairs :]])


def draw(
    pairs: int, size: torch.Size, mixup: float, cutmix: float, key: int, offset: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """For each pair the share [P] a sample keeps of itself, and the box [P, 4] (top, left, bottom, right) that
    CutMix takes from its partner; an empty box stands for MixUp."""
    places = max(batch_size, offset + 2 * pairs) // 2
    generator = np.random.Generator(np.random.Philox(key))
    blend = generator.beta(mixup or 1.0, mixup or 1.0, places)
    area = generator.beta(cutmix or 1.0, cutmix or 1.0, places)
    choice, centre_y, centre_x = generator.random((3, places))
    cut = (choice < 0.5) if mixup and cutmix else np.full(places, bool(cutmix))
    height, width = size
    half_y, half_x = np.sqrt(1 - area) * height / 2, np.sqrt(1 - area) * width / 2
    top = np.clip(np.round(centre_y * height - half_y), 0, height)
    bottom = np.clip(np.round(centre_y * height + half_y), 0, height)
    left = np.clip(np.round(centre_x * width - half_x), 0, width)
    right = np.clip(np.round(centre_x * width + half_x), 0, width)
    share = np.where(cut, 1 - (bottom - top) * (right - left) / (height * width), blend)
    box = np.where(cut[:, None], np.stack([top, left, bottom, right], 1), 0)
    mine = slice(offset // 2, offset // 2 + pairs)
    return torch.from_numpy(share[mine]).float(), torch.from_numpy(box[mine]).long()


def kept_shares(share_P: Tensor, box_P4: Tensor, size: torch.Size) -> Tensor:
    """What each pixel keeps of its own image, [P, H, W]: the same everywhere, or 0 inside the box and 1 outside."""
    rows, columns = (torch.arange(length, device=share_P.device) for length in size)
    top, left, bottom, right = (edge[:, None] for edge in box_P4.T)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]
    boxed = (box_P4[:, 2] > box_P4[:, 0]) & (box_P4[:, 3] > box_P4[:, 1])
    # an empty CutMix box leaves a share of 1: nothing is mixed
    return torch.where(boxed[:, None, None], (~inside).float(), share_P[:, None, None].expand_as(inside))
