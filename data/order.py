"""Which samples form a step, and under which key each is augmented: pure functions of seed, epoch and step.

Nothing here has state to save. A run that was killed, or that continues on another number of processes or
workers, computes the same global batches again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

MASK = 0xFFFFFFFFFFFFFFFF
GOLDEN, MULTIPLY_1, MULTIPLY_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Use(IntEnum):
    """What a key is for. Keys of different uses are independent, even of the same sample."""

    ORDER = 1
    AUGMENT = 2
    STEP = 3
    SPLIT = 4
    WEIGHTS = 5
    MIXING = 6


def mix(*values: int) -> int:
    """Fold integers into one 64-bit key by splitmix64 (Steele et al. 2014): equal on every machine and version."""
    key = GOLDEN
    for value in values:
        key = ((key ^ (value & MASK)) + GOLDEN) & MASK
        key = ((key ^ (key >> 30)) * MULTIPLY_1) & MASK
        key = ((key ^ (key >> 27)) * MULTIPLY_2) & MASK
        key ^= key >> 31
    return key


def mix_ids(*values: int, ids: np.ndarray) -> np.ndarray:
    """`[mix(*values, id) for id in ids]` at array speed, as uint64 [N]."""
    key = np.uint64(mix(*values)) ^ ids.astype(np.int64).view(np.uint64)
    key += np.uint64(GOLDEN)  # wraps around, as in mix
    key = (key ^ (key >> np.uint64(30))) * np.uint64(MULTIPLY_1)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(MULTIPLY_2)
    return key ^ (key >> np.uint64(31))


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: the numbers 0..size-1, sorted by their keys, int64 [size]."""
    return np.argsort(mix_ids(seed, Use.ORDER, epoch, ids=np.arange(size)), kind="stable")


class Draw(NamedTuple):
    """What a loader process needs to make one micro-batch, whichever process it is."""

    ids: np.ndarray  # int64 [B], places in the source
    keys: np.ndarray  # uint64 [B], one augmentation key a sample
    counts: bool = True  # False: a stand-in that keeps this process in step, to be left out of every sum


class TrainOrder:
    """The micro-batches of one process: its slice of each global batch, in order.

    ids: int64 [N], the samples of the training split. The tail of an epoch that fills no global batch is
    dropped (another one each epoch).
    """

    def __init__(
        self,
        ids: np.ndarray,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        process: int = 0,
        processes: int = 1,
    ):
        if batch_size % processes:
            raise ValueError(f"a global batch of {batch_size} samples cannot be shared by {processes} processes")
        self.ids, self.seed, self.batch_size = ids, seed, batch_size
        self.process, self.processes = process, processes
        self.micro_batch = even_parts(batch_size // processes, micro_batch_size)
        self.steps_per_epoch = len(ids) // batch_size
        self.epoch = self.first_step = 0

    def __iter__(self) -> Iterator[Draw]:
        order = self.ids[permutation(self.seed, self.epoch, len(self.ids))]
        share = self.batch_size // self.processes
        for step in range(self.first_step, self.steps_per_epoch):
            start = step * self.batch_size + self.process * share
            for place in range(start, start + share, self.micro_batch):
                ids = order[place : min(place + self.micro_batch, start + share)]
                yield Draw(ids, mix_ids(self.seed, Use.AUGMENT, self.epoch, ids=ids))


def even_parts(share: int, at_most: int) -> int:
    """The size of micro-batches of about one size (33 in parts of at most 32 is 18 + 15, not 32 + 1), even where
    it can be, since MixUp pairs neighbours."""
    size = -(-share // -(-share // at_most))
    return min(at_most, size + size % 2)


class EvalOrder:
    """Every sample once, shared out over the processes, as many micro-batches on each."""

    def __init__(self, ids: np.ndarray, *, micro_batch_size: int, process: int = 0, processes: int = 1):
        self.ids, self.micro_batch_size, self.process, self.processes = (
            ids,
            micro_batch_size,
            process,
            processes,
        )

    def __len__(self) -> int:
        return -(-len(self.ids) // (self.micro_batch_size * self.processes))

    def __iter__(self) -> Iterator[Draw]:
        together = self.micro_batch_size * self.processes
        for place in range(0, len(self.ids), together):
            ids = np.array_split(self.ids[place : place + together], self.processes)[self.process]
            counts = len(ids) > 0
            ids = ids if counts else self.ids[:1]
            yield Draw(ids, np.zeros(len(ids), np.uint64), counts)


@contextmanager
def generator_kept() -> Iterator[None]:
    """Leave torch's CPU generator as it was: augmentation in this process must not disturb dropout."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def seed_cpu(key: int) -> None:
    """Seed torch's CPU generator alone: 1 us, where torch.manual_seed seeds every device in 100 us."""
    torch.default_generator.manual_seed(key & 0x7FFFFFFFFFFFFFFF)


def seed_device(key: int, device: torch.device) -> None:
    """Seed the generators that a training step on this device draws from."""
    seed_cpu(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key & 0x7FFFFFFFFFFFFFFF)
    elif device.type == "mps":
        torch.mps.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
