"""Which samples form a step, and under which key each is augmented: pure functions of seed, epoch and step.

Nothing here has state to save. A run that was killed, or that continues on another number of processes or
workers, computes the same global batches again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data.batch_sizes import BatchSizes

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
    GEOMETRY = 7
    REPEAT = 8
    BLOCKS = 9
    CAPTION = 10


def mix(*values: int, after: int = GOLDEN) -> int:
    """Fold integers into one 64-bit key by splitmix64 (Steele et al. 2014): equal on every machine and version.

    `mix(1, 2, 3)` is `mix(3, after=mix(1, 2))`.
    """
    key = after
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


class Rows(NamedTuple):
    """Undecoded samples of a stream; a label that could not be read has a fault."""

    pictures: list[bytes]
    labels: np.ndarray  # [B]


class Draw(NamedTuple):
    """What a loader process needs to make one micro-batch, whichever process it is."""

    ids: np.ndarray  # int64 [B], places in the source
    keys: np.ndarray  # uint64 [B], one augmentation key a sample
    counts: bool = True  # False: a stand-in that keeps this process in step, to be left out of every sum
    rows: Rows | None = None  # of a stream; else the loader process reads the ids from its source
    # (slot, attempt) -> the sample that stands in for a bad one there, under the slot's key; None in evaluation
    spare: Callable[[int, int], Draw] | None = None
    ahead: Callable[[], list[int]] | None = None  # the blocks of a stream that are needed from here on


class Samples(Protocol):
    """The samples of an epoch in their order: pure functions of (seed, epoch)."""

    size: int  # samples an epoch

    def take(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Places start..stop-1 of the epoch: ids int64 [B], and which pass over a sample this is, int64 [B]."""


class Shuffled:
    """Every sample once an epoch, all of them shuffled. ids: int64 [N]."""

    def __init__(self, ids: np.ndarray, seed: int):
        self.ids, self.seed, self.size = ids, seed, len(ids)
        self._epoch, self._order = -1, ids

    def take(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.ids[permutation(self.seed, epoch, self.size)]
        ids = self._order[start:stop]
        return ids, np.zeros(len(ids), np.int64)


class Resampled:
    """Samples by weight: one of weight w comes up w * size / sum times an epoch, rounded up or down by turns.

    An epoch has as many samples as the weights sum up to. Systematic resampling (Kitagawa 1996), class by class: within
    an epoch the counts of a sample and of a class are those of their weights, to one. classes: int64 [N].
    """

    def __init__(self, ids: np.ndarray, weights: np.ndarray, classes: np.ndarray, seed: int):
        self.ids, self.weights, self.classes, self.seed = ids, weights, classes, seed
        self.size = max(1, round(float(weights.sum())))
        self._epoch, self._ids, self._passes = -1, ids, ids

    def take(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch != self._epoch:
            self._epoch, (self._ids, self._passes) = epoch, self._resample(epoch)
        return self._ids[start:stop], self._passes[start:stop]

    def _resample(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        turn = permutation(mix(self.seed, Use.REPEAT), epoch, len(self.ids))
        turn = turn[np.argsort(self.classes[turn], kind="stable")]
        ends = np.cumsum(self.weights[turn])
        first = mix(self.seed, Use.REPEAT, epoch) / 2.0**64
        picks = np.searchsorted(ends, (first + np.arange(self.size)) * (ends[-1] / self.size), side="right")
        picks = np.sort(turn[np.minimum(picks, len(turn) - 1)])
        passes = np.arange(self.size) - np.searchsorted(picks, picks)
        order = permutation(self.seed, epoch, self.size)
        return self.ids[picks][order], passes[order]


class Blocks:
    """A stream: blocks in shuffled order, the rows of a few neighbouring ones (a chunk) shuffled together.

    blocks: int64 [N], the block of each id. Only a chunk's rows have to be at hand at a time.
    """

    def __init__(self, ids: np.ndarray, blocks: np.ndarray, *, open_blocks: int, seed: int):
        by_block = np.argsort(blocks, kind="stable")
        self.ids, self.seed, self.size = ids[by_block], seed, len(ids)
        self.numbers, self.starts = np.unique(blocks[by_block], return_index=True)
        self.lengths = np.diff(self.starts, append=self.size)
        self.open_blocks = open_blocks
        self._epoch = -1
        self._turn = self._ends = self.starts
        self._chunks: dict[int, np.ndarray] = {}

    def take(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self._set_epoch(epoch)
        parts = []
        stop = min(stop, self.size)
        while start < stop:
            chunk = int(np.searchsorted(self._ends, start, side="right"))
            begin = int(self._ends[chunk - 1]) if chunk else 0
            parts.append(self._chunk(chunk)[start - begin : stop - begin])
            start += len(parts[-1])
        ids = np.concatenate(parts)
        return ids, np.zeros(len(ids), np.int64)

    def blocks_from(self, epoch: int, place: int) -> list[int]:
        """The blocks that are needed from this place on: of its chunk and of the next."""
        self._set_epoch(epoch)
        chunk = int(np.searchsorted(self._ends, place, side="right"))
        return self.numbers[self._turn[chunk * self.open_blocks : (chunk + 2) * self.open_blocks]].tolist()

    def _set_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._chunks = epoch, {}
            self._turn = np.argsort(mix_ids(self.seed, Use.BLOCKS, epoch, ids=self.numbers), kind="stable")
            lasts = np.arange(self.open_blocks, len(self._turn) + self.open_blocks, self.open_blocks) - 1
            self._ends = np.cumsum(self.lengths[self._turn])[np.minimum(lasts, len(self._turn) - 1)]

    def _chunk(self, chunk: int) -> np.ndarray:
        """The shuffled ids of a chunk; the last two are remembered."""
        if chunk not in self._chunks:
            if len(self._chunks) > 1:
                del self._chunks[min(self._chunks)]
            turn = self._turn[chunk * self.open_blocks : (chunk + 1) * self.open_blocks]
            ids = np.concatenate([self.ids[self.starts[b] : self.starts[b] + self.lengths[b]] for b in turn])
            self._chunks[chunk] = ids[np.argsort(mix_ids(self.seed, Use.ORDER, self._epoch, ids=ids), kind="stable")]
        return self._chunks[chunk]


class Mixed:
    """Several datasets at once, drawn from by their weights; an epoch has as many samples as they have together.

    Each is passed over at its own pace, in its own order, and goes on in the next epoch where it stopped: none of its
    samples comes again before all have come.
    """

    def __init__(self, parts: Sequence[Samples], weights: Sequence[float], seed: int):
        self.parts, self.seed = parts, seed
        self.size = sum(part.size for part in parts)
        ends = np.floor(np.cumsum(weights) / np.sum(weights) * self.size + 0.5).astype(np.int64)
        self.quotas = np.diff(ends, prepend=0)  # samples of each an epoch
        self._epoch = -1
        self._part = self._turn = ends
        self._places: list[np.ndarray] = []

    def take(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self._set_epoch(epoch)
        part_of_slot = self._part[start:stop]
        ids, passes = np.empty(len(part_of_slot), np.int64), np.empty(len(part_of_slot), np.int64)
        for number, part in enumerate(self.parts):
            slots = np.flatnonzero(part_of_slot == number)
            begun = epoch * int(self.quotas[number])
            while len(slots):  # once, or twice where a pass ends here
                taken_before = begun + int(self._turn[start + slots[0]])
                nth, place = divmod(taken_before, part.size)
                now, slots = np.split(slots, [part.size - place])
                ids[now] = part.take(nth, place, place + len(now))[0]
                passes[now] = nth - begun // part.size
        return ids, passes

    def blocks_from(self, epoch: int, place: int) -> list[int]:
        """The blocks that are needed from this place on, where the parts are streams."""
        self._set_epoch(epoch)
        needed = []
        for number, part in enumerate(self.parts):
            before = int(np.searchsorted(self._places[number], place))
            if isinstance(part, Blocks):
                needed += part.blocks_from(*divmod(epoch * int(self.quotas[number]) + before, part.size))
        return needed

    def _set_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._part = np.repeat(np.arange(len(self.parts)), self.quotas)[permutation(self.seed, epoch, self.size)]
        self._turn = np.empty(self.size, np.int64)  # how many of its part came before
        self._places = [np.flatnonzero(self._part == number) for number in range(len(self.parts))]
        for places in self._places:
            self._turn[places] = np.arange(len(places))


def keys_of(seed: int, epoch: int, ids: np.ndarray, passes: np.ndarray) -> np.ndarray:
    """Augmentation keys, uint64 [B]: one for each sample and epoch, another one each time it comes again."""
    keys = mix_ids(seed, Use.AUGMENT, epoch, ids=ids)
    again = passes > 0
    if again.any():
        keys[again] = mix_ids(Use.REPEAT, ids=(keys[again] + passes[again].astype(np.uint64)).view(np.int64))
    return keys


class TrainOrder:
    """The micro-batches of one process: its slice of each global batch, in order.

    The tail of an epoch that fills no global batch is dropped (another one each epoch).
    """

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        batch_size: int | BatchSizes,
        micro_batch_size: int,
        process: int = 0,
        processes: int = 1,
    ):
        self.batch_sizes = BatchSizes(batch_size) if isinstance(batch_size, int) else batch_size
        for size in self.batch_sizes.all():
            if size % processes:
                raise ValueError(f"a global batch of {size} samples cannot be shared by {processes} processes")
        self.samples, self.seed, self.micro_batch_size = samples, seed, micro_batch_size
        self.process, self.processes = process, processes
        self.move_to(0, 0)

    def move_to(self, epoch: int, step: int) -> None:
        """Let the next iteration begin there."""
        self.epoch, self.first_step, self.batch_size = epoch, step, self.batch_sizes.at(epoch)
        self.micro_batch = even_parts(self.batch_size // self.processes, self.micro_batch_size)
        self.steps_per_epoch = self.steps_of(epoch)

    def steps_of(self, epoch: int) -> int:
        return self.samples.size // self.batch_sizes.at(epoch)

    def __iter__(self) -> Iterator[Draw]:
        share = self.batch_size // self.processes
        for step in range(self.first_step, self.steps_per_epoch):
            start = step * self.batch_size + self.process * share
            for place in range(start, start + share, self.micro_batch):
                yield self.draw(self.epoch, place, min(place + self.micro_batch, start + share))

    def draw(self, epoch: int, start: int, stop: int) -> Draw:
        ids, passes = self.samples.take(epoch, start, stop)
        keys = keys_of(self.seed, epoch, ids, passes)

        def spare(slot: int, attempt: int) -> Draw:
            """The next of the epoch, after its last the first: the same whatever the micro-batch and process."""
            place = (start + slot + attempt) % self.samples.size
            return Draw(self.samples.take(epoch, place, place + 1)[0], keys[slot : slot + 1])

        blocks = self.samples.blocks_from if isinstance(self.samples, (Blocks, Mixed)) else None
        return Draw(ids, keys, spare=spare, ahead=blocks and (lambda: blocks(epoch, start)))


def even_parts(share: int, at_most: int) -> int:
    """The size of micro-batches of about one size (33 in parts of at most 32 is 18 + 15, not 32 + 1), even where
    it can be, since MixUp pairs neighbours."""
    size = -(-share // -(-share // at_most))
    return min(at_most, size + size % 2)


def parts(batch_size: int, processes: int, at_most: int) -> list[int]:
    """Sizes of the micro-batches of a global batch, those of one process after the other."""
    share = batch_size // processes
    size = even_parts(share, at_most)
    return [min(size, share - start) for start in range(0, share, size)] * processes


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
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(key & 0x7FFFFFFFFFFFFFFF)
    elif device.type == "mps":
        torch.mps.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
