"""Where a picture is cut and how large it becomes: pure functions of its key and its size.

One sample and a whole batch follow the same rules, so a picture has the same pixels in memory, from a cache,
from a file or from a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from data.order import Use, mix, mix_ids

SMALL = 64  # pixels; up to here pictures are padded and shifted, above they are cropped at random scales
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of random crops (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842)


# Which of a key's random numbers are for what; random_box takes those from 0 on.
SHIFT, FLIP = 100, 102


class Box(NamedTuple):
    """Part of an upright picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


# From the (height, width) of an upright picture: the part to take, and the (height, width) it is resized to.
Plan = Callable[[int, int], tuple[Box, tuple[int, int]]]


def uniform(key: int, number: int) -> float:
    """The key's number-th random number in [0, 1)."""
    return (mix(key, after=key_of_number(number)) >> 11) * 2.0**-53


@cache
def key_of_number(number: int) -> int:
    """What the number-th random numbers of all keys share: two thirds of their cost, 10 us a crop."""
    return mix(Use.GEOMETRY, number)


def uniforms(keys: np.ndarray, number: int) -> np.ndarray:
    """The same for an array of keys, float64 [N]."""
    return (mix_ids(Use.GEOMETRY, number, ids=keys.view(np.int64)) >> np.uint64(11)) * 2.0**-53


def whole(height: int, width: int) -> Box:
    return Box(0, 0, height, width)


def centre(height: int, width: int) -> Box:
    """The square in the middle, 7/8 of the shorter side: the usual 224 of 256."""
    side = max(1, round(min(height, width) * 7 / 8))
    return Box((height - side) // 2, (width - side) // 2, side, side)


def random_box(key: int, height: int, width: int) -> Box:
    """A box of random area and aspect that fits; after ten misses the largest of an allowed aspect, centred."""
    for attempt in range(10):
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * uniform(key, 4 * attempt))
        low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
        aspect = math.exp(low + (high - low) * uniform(key, 4 * attempt + 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(key, 4 * attempt + 2) * (height - h + 1))
            left = int(uniform(key, 4 * attempt + 3) * (width - w + 1))
            return Box(top, left, h, w)
    h = min(height, max(1, round(width / ASPECT[0])))
    w = min(width, max(1, round(height * ASPECT[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


class Geometry(NamedTuple):
    """The geometric part of a transform: `plan` says what to decode; then a random crop is turned, a whole picture
    moved."""

    cut: Literal["whole", "centre", "random"]
    size: int  # side of the square that comes out, pixels
    padding: int = 0  # pixels by which the square may be shifted; what comes in is black
    flip: bool = False  # left and right are swapped for half of the keys

    def plan(self, key: int) -> Plan:
        def choose(height: int, width: int) -> tuple[Box, tuple[int, int]]:
            if self.cut == "random":
                return random_box(key, height, width), (self.size, self.size)
            return (whole if self.cut == "whole" else centre)(height, width), (self.size, self.size)

        return choose

    def turn(self, image_CHW: torch.Tensor, key: int) -> None:
        """Flip one picture by its key, in place, right after its cut, while it is in the processor's cache."""
        if self.flip and uniform(key, FLIP) < 0.5:
            image_CHW.copy_(image_CHW.flip(2))

    def move(self, images_BCHW: torch.Tensor, keys: np.ndarray) -> torch.Tensor:
        """Shift and flip a batch of squares, each by its key; may change its input."""
        pixels = images_BCHW.numpy()
        if self.padding:
            reach = 2 * self.padding + 1
            tops, lefts = ((uniforms(keys, SHIFT + axis) * reach).astype(np.int64) for axis in (0, 1))
            pixels = shifted(pixels, tops, lefts, self.padding)
        if self.flip:
            flips = uniforms(keys, FLIP) < 0.5
            pixels[flips] = pixels[flips][..., ::-1]
        return torch.from_numpy(pixels)


def shifted(images_BCHW: np.ndarray, tops: np.ndarray, lefts: np.ndarray, padding: int) -> np.ndarray:
    """Pad with black all round, and cut a square of the old size at (top, left) of each: 300,000 a second at 32x32."""
    count, channels, height, width = images_BCHW.shape
    padded = np.zeros((count, channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, :, padding : padding + height, padding : padding + width] = images_BCHW
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(count), :, tops, lefts]
