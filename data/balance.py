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


def class_weights(counts_C: np.ndarray, samples: int, *, root: bool) -> np.ndarray:
    """What the losses of each class's samples are multiplied by, float64 [classes]: by 1 / count, or its root.

    The mean over the training samples is 1, so that a loss stays a mean over samples; a class without any has 1.
    """
    present_C = counts_C > 0
    inverse_C = np.where(present_C, 1 / np.maximum(counts_C, 1), 0.0)
    weights_C = np.sqrt(inverse_C) if root else inverse_C
    return np.where(present_C, weights_C * samples / (weights_C * counts_C).sum(), 1.0)


def positive_weights(counts_C: np.ndarray, samples: int, *, root: bool) -> np.ndarray:
    """What the loss of a class is multiplied by where a picture has it, float64 [classes]: pictures without it for
    each one with it, or the root; 1 where all or none have it."""
    both_C = (counts_C > 0) & (counts_C < samples)
    ratio_C = np.where(both_C, (samples - counts_C) / np.maximum(counts_C, 1), 1.0)
    return np.sqrt(ratio_C) if root else ratio_C
