"""Embedded scenes with captions: real digits (data/embedded.py) on a black canvas, and how they stand to each other.

The pixels are real, the layout and the words are generated: one to three digits of 8x8 pixels, `a three`,
`a five left of a two`, `a one above a seven above a four`. Each split has digits, images of data/digits.npz, of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.captions import CaptionLabels, as_labels
from data.sources import Source, TensorSource

SIDE, DIGIT = 24, 8  # pixels
SCENES = {"train": 6000, "val": 300, "test": 300}
DIGITS = {"train": 1197, "val": 300, "test": 300}
SHARES = (0.1, 0.6, 0.3)  # of scenes with one, two and three digits
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEED = 0


def load_digit_captions() -> dict[str, Source]:
    """The same scenes on every machine."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        digits = np.round(file["images"] * (255 / 16)).astype(np.uint8)
        numbers = file["labels"]
    generator = np.random.Generator(np.random.PCG64(SEED))
    shuffled = generator.permutation(len(digits))
    scenes, begin = {}, 0
    for part, count in DIGITS.items():
        own = shuffled[begin : begin + count]
        begin += count
        scenes[part] = [scene(digits[own], numbers[own], generator) for _ in range(SCENES[part])]
    kind = CaptionLabels([(text,) for _, text in scenes["train"]])
    return {
        part: TensorSource(
            torch.from_numpy(np.stack([image for image, _ in made]))[:, None],
            as_labels((text,) for _, text in made),
            kind,
        )
        for part, made in scenes.items()
    }


def scene(digits: np.ndarray, numbers: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, str]:
    """uint8 [SIDE, SIDE] and its caption, of some of digits [N, DIGIT, DIGIT] with numbers [N]."""
    count = 1 + int(generator.choice(len(SHARES), p=SHARES))
    chosen = generator.choice(len(digits), count, replace=False)
    upright = bool(generator.integers(2))
    # along the row or column each digit has its part of the canvas to itself; across it they stand anywhere
    part = SIDE // count
    along = [place * part + int(generator.integers(part - DIGIT + 1)) for place in range(count)]
    across = generator.integers(SIDE - DIGIT + 1, size=count).tolist()
    image = np.zeros((SIDE, SIDE), np.uint8)
    for digit, one, other in zip(chosen, along, across):
        top, left = (one, other) if upright else (other, one)
        image[top : top + DIGIT, left : left + DIGIT] = digits[digit]
    words = [("an " if numbers[digit] == 8 else "a ") + WORDS[numbers[digit]] for digit in chosen]
    return image, (" above " if upright else " left of ").join(words)
