"""Stratified hold-out: a pure function of the labels, the shares and the split seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.order import Use, mix_ids


def stratified_split(ids: np.ndarray, labels: np.ndarray, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Part ids [N] by shares within each class, as sorted int64 arrays; labels [N] belong to the ids.

    A sample's part depends on the seed, its id and its class alone, not on the machine.
    """
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    edges = np.cumsum(shares) / np.sum(shares)
    for label in np.unique(labels):
        members = ids[labels == label]
        members = members[np.argsort(mix_ids(seed, Use.SPLIT, ids=members), kind="stable")]
        cuts = np.floor(edges[:-1] * len(members) + 0.5).astype(int)
        for part, chunk in zip(parts, np.split(members, cuts)):
            part.append(chunk)
    return [np.sort(np.concatenate(part)) for part in parts]
