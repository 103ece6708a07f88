"""How often a sample comes, from the counts of the classes."""

from __future__ import annotations

from typing import Literal

import numpy as np


def repeats(labels: np.ndarray, num_classes: int, sampling: Literal["balanced", "repeat_factor"]) -> np.ndarray:
    """How often each sample comes in an epoch on average, float64 [N].

    balanced: every class equally often, in an epoch of N samples. repeat_factor: a class of share f comes
    max(1, sqrt(1 / (classes * f))) times as often, so that no sample is left out (Gupta et al. 2019,
    https://arxiv.org/abs/1908.03195, with the uniform share as threshold).
    """
    counts_C = np.bincount(labels, minlength=num_classes)
    present = int((counts_C > 0).sum())
    uniform_share = len(labels) / (present * np.maximum(counts_C, 1))
    factors_C = uniform_share if sampling == "balanced" else np.maximum(1.0, np.sqrt(uniform_share))
    return factors_C[labels]


def effective_counts(labels: np.ndarray, weights: np.ndarray, num_classes: int) -> np.ndarray:
    """Samples of each class that an epoch sees, float64 [classes]."""
    return np.bincount(labels, weights=weights, minlength=num_classes)


def rare_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Classes with less than half of the mean class's samples, bool [classes]."""
    counts_C = np.bincount(labels, minlength=num_classes)
    return counts_C < counts_C[counts_C > 0].mean() / 2
