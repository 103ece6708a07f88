"""What a model and its trainer have to know of the labels: JSON that is saved with the model."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.balance import class_weights, positive_weights
from data.labels import Labels
from data.several import SeveralLabels
from data.targets import NumberLabels


def described(kind: Labels, labels: np.ndarray | None, weighting: str) -> dict[str, Any]:
    """labels: those of the training split, [N]; None where they are not at hand, as in a stream.

    kind; of numbers mean and std; `weights` of classes where --class_weights asks for them; of several kinds a
    description of each, with its classes and the share of training samples that have this label.
    """
    facts: dict[str, Any] = {"kind": kind.name}
    if isinstance(kind, SeveralLabels):
        facts["of"] = {}
        for name, part in kind.parts.items():
            known = kind.known(labels, name) if labels is not None else None
            share = len(known) / len(labels) if labels is not None and known is not None else 1.0
            facts["of"][name] = described(part, known, weighting) | {"classes": part.classes, "share": share}
    elif isinstance(kind, NumberLabels):
        facts |= {"mean": kind.mean, "std": kind.std}
    elif weighting != "none" and labels is not None:
        weigh = positive_weights if kind.name == "multi_label" else class_weights
        facts["weights"] = weigh(kind.counts(labels), len(labels), root=weighting == "sqrt").tolist()
    return facts
