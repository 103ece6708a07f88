"""Embedded scenes with captions: real digits (data/embedded.py) on a black canvas, and how they stand to each other.

The pixels are real, the layout and the words are generated: one to three digits of 8x8 pixels, `a three`,
`a five left of a two`, `a one above a seven above a four`; one alone may be two or three times as large. Each split has
the digits that `--dataset digits` has in it by default, and no other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data.captions import CaptionLabels, as_labels
from data.sources import Source, TensorSource
from data.splits import stratified_split

SIDE, DIGIT = 24, 8  # pixels
SCENES = {"train": 6000, "val": 300, "test": 300}
DIGIT_SHARES = (0.8, 0.1, 0.1)  # of the digits in these splits
SHARES = (0.2, 0.5, 0.3)  # of scenes with one, two and three digits
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def load_digit_captions() -> dict[str, Source]:
    """The same scenes on every machine."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        digits = np.round(file["images"] * (255 / 16)).astype(np.uint8)
        numbers = file["labels"]
    generator = np.random.Generator(np.random.PCG64(0))
    parts = stratified_split(np.arange(len(digits)), numbers, DIGIT_SHARES, seed=0)
    scenes = {
        part: [scene(digits[own], numbers[own], generator) for _ in range(count)]
        for (part, count), own in zip(SCENES.items(), parts)
    }
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
    larger = int(generator.integers(1, 4)) if count == 1 else 1
    side, part = larger * DIGIT, SIDE // count
    upright = bool(generator.integers(2))
    image = np.zeros((SIDE, SIDE), np.uint8)
    for place, digit in enumerate(chosen):
        # along the row or column each digit has a part of the canvas to itself; across it stands anywhere
        along = place * part + int(generator.integers(part - side + 1))
        across = int(generator.integers(SIDE - side + 1))
        top, left = (along, across) if upright else (across, along)
        image[top : top + side, left : left + side] = digits[digit].repeat(larger, 0).repeat(larger, 1)
    words = [("an " if numbers[digit] == 8 else "a ") + WORDS[numbers[digit]] for digit in chosen]
    return image, (" above " if upright else " left of ").join(words)
