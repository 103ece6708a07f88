"""The embedded default: 1,797 real 8x8 digits.

"Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak 1998, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, CC BY 4.0), the part that scikit-learn's `load_digits` returns. Kept here as a
45 kB file, so that a first run needs neither a download nor scikit-learn with scipy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.columns import array_of
from data.digit_captions import load_digit_captions
from data.digit_scenes import digit_scenes
from data.labels import ClassLabels
from data.several import SeveralLabels
from data.sources import Source, TensorSource
from data.targets import NumberLabels


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 8, 8], grey values 0..16 spread over 0..255, and the digits they show."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        return np.round(file["images"] * (255 / 16)).astype(np.uint8), file["labels"]


def load_digits() -> TensorSource:
    pixels, labels = read_digits()
    return TensorSource(torch.from_numpy(pixels)[:, None], labels, [str(digit) for digit in range(10)])


def load_digit_scenes() -> dict[str, Source]:
    return digit_scenes(*read_digits())


def load_digit_ink() -> TensorSource:
    """The same digits, each with the amount of its ink: the mean of its pixels, 0 to 1."""
    digits = load_digits()
    ink = digits.images_NCHW.double().mean((1, 2, 3)).numpy() / 255
    kind = SeveralLabels({"digit": ClassLabels(digits.kind.classes), "ink": NumberLabels.of("ink", ink)})
    return TensorSource(digits.images_NCHW, array_of(list(zip(digits.labels.tolist(), ink.tolist()))), kind)


# A dataset of your own: a function that returns a Source, or one for each of train, val and test. Its mean and std go
# into configs/dataset_info.py.
SOURCES: dict[str, Callable[[], Source | dict[str, Source]]] = {
    "digits": load_digits,
    "digit_captions": load_digit_captions,
    "digit_ink": load_digit_ink,
    "digit_scenes": load_digit_scenes,
}
