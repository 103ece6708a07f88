"""Splits: pure functions of ids, labels or groups, of the shares and the split seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from configs.errors import DataError
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


def grouped_split(
    ids: np.ndarray, groups: np.ndarray, labels: np.ndarray, shares: Sequence[float], seed: int
) -> list[np.ndarray]:
    """Part ids [N] by shares, a group whole in one part, as sorted int64 arrays; classes are balanced where it can be.

    groups [N], ints or strings, and labels [N] belong to the ids. Depends on the seed, the groups and what they hold,
    not on ids, the order of rows or the machine. With P parts of a share above 0, none of them is empty, and
    none has more than its share by as much as the largest group, nor less by as much as P - 1 such groups.
    Raises DataError where there are fewer groups than such parts, or where a group is neither int nor string.
    """
    names, group_of = np.unique(checked_groups(groups), return_inverse=True)
    classes, class_of = np.unique(labels, return_inverse=True)
    wanted = sum(share > 0 for share in shares)
    if len(names) < wanted:
        raise DataError(
            f"{len(names)} groups cannot be cut into {wanted} parts, since a group stays whole",
            fix="give more groups, or cut fewer parts with --split A B C",
        )
    held: list[list[tuple[int, int]]] = [[] for _ in names]
    cells, counts = np.unique(group_of * len(classes) + class_of, return_counts=True)
    for cell, count in zip(cells.tolist(), counts.tolist()):
        held[cell // len(classes)].append((cell % len(classes), count))
    # Large groups first, for the small ones fill the gaps; groups of about one size (powers of 2) as the seed has it.
    turns = np.lexsort((group_keys(names, seed), -np.frexp(np.bincount(group_of))[1]))
    part_of_group = np.empty(len(names), np.int64)
    part_of_group[turns] = fill_parts([held[group] for group in turns.tolist()], shares)
    part_of_row = part_of_group[group_of]
    return [np.sort(ids[part_of_row == part]) for part in range(len(shares))]


def checked_groups(groups: np.ndarray) -> np.ndarray:
    """The groups as an array of ints or of strings. Raises DataError for any other value, such as a missing one."""
    groups = groups if groups.dtype.kind in "iuU" else np.array(groups.tolist())
    if groups.dtype.kind not in "iuU" and len(groups):
        values = groups.tolist()
        row = next((row for row, value in enumerate(values) if type(value) not in (int, str)), 0)
        raise DataError(
            f"the group of row {row} is {values[row]!r}",
            fix="groups are all ints or all strings; give each sample one",
        )
    return groups


def group_keys(names: np.ndarray, seed: int) -> np.ndarray:
    """A random key for each int or string, uint64 [N], equal on every machine."""
    if names.dtype.kind == "U":
        hashes = [blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names.tolist()]
        names = np.frombuffer(b"".join(hashes), "<i8")
    return mix_ids(seed, Use.SPLIT, ids=names)


def fill_parts(held: list[list[tuple[int, int]]], shares: Sequence[float]) -> list[int]:
    """The part of each group, in turn: of the parts that are not full, the one that lacks most of the group's classes.

    held: for each group its (class, count) pairs. Plain Python numbers, since sums of numpy differ between machines.
    """
    totals: Counter[int] = Counter()
    for pairs in held:
        totals.update(dict(pairs))
    scale = sum(shares)
    lacks = [{label: share / scale * total for label, total in totals.items()} for share in shares]
    room = [share / scale * totals.total() for share in shares]
    empty = [part for part, share in enumerate(shares) if share > 0]
    chosen = []
    for turn, pairs in enumerate(held):
        last_chance = len(held) - turn <= len(empty)
        parts = empty if last_chance else [part for part, left in enumerate(room) if left > 1e-6]  # rounding errors
        part = max(parts, key=lambda part: sum(count * lacks[part][label] / totals[label] for label, count in pairs))
        for label, count in pairs:
            lacks[part][label] -= count
            room[part] -= count
        empty = [other for other in empty if other != part]
        chosen.append(part)
    return chosen


def part_of(ids: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The part of each of ids [N] by its own random number, int64 [N]: for streams, whose length nobody knows.

    A sample's part depends on the seed, its id and the shares alone. Parts have their shares on average only.
    """
    uniform = (mix_ids(seed, Use.SPLIT, ids=ids) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    edges = np.cumsum(shares)
    return np.searchsorted(edges[:-1] / edges[-1], uniform, side="right").astype(np.int64)
