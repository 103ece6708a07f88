"""Scenes to find digits in: the pixels are those of the embedded real digits, the layout is generated.

Training, validation and test scenes are made of different digits. Everything is drawn from numpy's RandomState, whose
numbers are the same in every version.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import interpolate

from data.boxes import Boxes, BoxLabels
from data.sources import Source, TensorSource

SIDE = 64  # pixels of a scene
DIGITS = (1, 5)  # in a scene, at least and at most
SIDES = (16, 28)  # pixels of a digit's square, which is 8x8 as it was scanned
INK = 40  # of 255: a box is drawn around what is brighter
SCENES = {"train": 2000, "val": 300, "test": 300}
PARTS = ("val", "test", "train", "train", "train", "train", "train", "train")  # of every eighth digit
TRIES = 20  # places that are tried for a digit


def digit_scenes(digits_N88: np.ndarray, labels_N: np.ndarray) -> dict[str, Source]:
    """Sources of train, val and test from digits uint8 [N, 8, 8] and their classes."""
    kind = BoxLabels([str(digit) for digit in range(10)])
    sources: dict[str, Source] = {}
    for seed, (part, count) in enumerate(SCENES.items()):
        mine = [place for place in range(len(labels_N)) if PARTS[place % len(PARTS)] == part]
        random = np.random.RandomState(seed)
        made = [scene(digits_N88[mine], labels_N[mine], random) for _ in range(count)]
        labels = np.empty(count, object)
        labels[:] = [label for _, label in made]
        sources[part] = TensorSource(torch.from_numpy(np.stack([pixels for pixels, _ in made]))[:, None], labels, kind)
    return sources


def scene(digits_N88: np.ndarray, labels_N: np.ndarray, random: np.random.RandomState) -> tuple[np.ndarray, Boxes]:
    """Pixels uint8 [SIDE, SIDE], and the boxes of their digits, none of which touch."""
    pixels = np.zeros((SIDE, SIDE), np.uint8)
    boxes: list[list[int]] = []
    classes: list[int] = []
    for _ in range(random.randint(DIGITS[0], DIGITS[1] + 1)):
        number, side = random.randint(len(labels_N)), random.randint(SIDES[0], SIDES[1] + 1)
        ink = cut_to_ink(enlarged(digits_N88[number], side))
        height, width = ink.shape
        for _ in range(TRIES):
            top, left = random.randint(SIDE - height + 1), random.randint(SIDE - width + 1)
            if not pixels[max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1].any():
                pixels[top : top + height, left : left + width] = ink
                boxes.append([left, top, left + width, top + height])
                classes.append(int(labels_N[number]))
                break
    return pixels, Boxes(np.array(boxes, np.float32), np.array(classes, np.int64))


def enlarged(digit_88: np.ndarray, side: int) -> np.ndarray:
    """uint8 [side, side], bilinear."""
    pixels = torch.from_numpy(digit_88)[None, None].float()
    return interpolate(pixels, size=(side, side), mode="bilinear")[0, 0].round().to(torch.uint8).numpy()


def cut_to_ink(pixels: np.ndarray) -> np.ndarray:
    """The part of a picture that is brighter than INK, with the fainter pixels in it."""
    ink = pixels > INK
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
