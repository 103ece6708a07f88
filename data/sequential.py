"""Streams that do not tell how many rows they have (webdataset, JSON, CSV): read from the front by `datasets`.

The order is a function of seed and epoch here, too, but to begin in its middle the rows before have to be
read again, undecoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from configs.errors import DataError
from data.columns import array_of
from data.labels import Labels
from data.order import Draw, Rows, Use, even_parts, keys_of, mix_ids
from data.retry import patiently
from data.sources import bytes_of_cell
from data.splits import part_of

LANES = 8  # files that are open at a time
ROW_BITS = 32  # an id is the file's number and the row's


class Row(NamedTuple):
    id: int
    picture: bytes
    label: Any


class Part(NamedTuple):
    """One part of a stream that comes unsplit; each row falls into a part by its id."""

    number: int
    shares: tuple[float, ...]
    split_seed: int


class SequentialStream:
    """The undecoded rows of a streamed dataset, by file."""

    in_memory = False

    def __init__(self, dataset: Any, image: str, kind: Labels, title: str, *, remote: bool):
        from datasets import Image

        self.dataset, self.image, self.kind = dataset.cast_column(image, Image(decode=False)), image, kind
        self.title, self.remote = title, remote
        self.files = dataset.num_shards
        self.channels = 3

    def rows_of_file(self, file: int) -> Iterator[Row]:
        """The rows of one file; a fault of the network begins it again where it broke off."""
        done = 0
        rows = iter(self.dataset.shard(self.files, file))

        def following() -> Any:
            nonlocal rows
            try:
                return next(rows, None)
            except Exception:
                rows = islice(iter(self.dataset.shard(self.files, file)), done, None)
                raise

        while (row := patiently(following, self.title, remote=self.remote)) is not None:
            cells = {column: [row[column]] for column in self.kind.columns}
            label = self.kind.read(cells, self.title, strict=False)[0]
            try:
                picture = bytes_of_cell(row[self.image], "")
            except DataError:
                picture = b""
            yield Row(file << ROW_BITS | done, picture, label)
            done += 1

    def rows(self, epoch: int | None, seed: int) -> Iterator[Row]:
        """All rows, from several files by turns; the files in an order of the epoch, or in their own for None."""
        turn = np.arange(self.files)
        if epoch is not None:
            turn = turn[np.argsort(mix_ids(seed, Use.BLOCKS, epoch, ids=turn), kind="stable")]
        waiting = turn.tolist()
        lanes: list[Iterator[Row]] = []
        while waiting or lanes:
            while waiting and len(lanes) < LANES:
                lanes.append(self.rows_of_file(waiting.pop(0)))
            for lane in list(lanes):
                row = next(lane, None)
                if row is None:
                    lanes.remove(lane)
                else:
                    yield row

    def chunks(self, epoch: int | None, seed: int, part: Part | None, chunk_rows: int) -> Iterator[list[Row]]:
        """A part's rows, so many at a time; shuffled within that, unless the epoch is None."""
        rows = self.rows(epoch, seed)
        while chunk := list(islice(rows, chunk_rows)):
            ids = np.array([row.id for row in chunk])
            mine = (
                np.ones(len(ids), bool) if part is None else part_of(ids, part.shares, part.split_seed) == part.number
            )
            order = np.arange(len(ids))
            if epoch is not None:
                order = np.argsort(mix_ids(seed, Use.ORDER, epoch, ids=ids), kind="stable")
            yield [chunk[place] for place in order if mine[place]]

    def name(self, place: int) -> str:
        return f"{self.title}, file {place >> ROW_BITS}, row {place & (1 << ROW_BITS) - 1}"


class SequentialTrainOrder:
    """TrainOrder for such a stream. steps_per_epoch is not known: max_steps bounds it."""

    def __init__(
        self,
        stream: SequentialStream,
        part: Part | None,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        chunk_rows: int,
        max_steps: int,
        process: int = 0,
        processes: int = 1,
    ):
        self.stream, self.part, self.seed, self.batch_size, self.chunk_rows = stream, part, seed, batch_size, chunk_rows
        self.share, self.process = batch_size // processes, process
        self.micro_batch = even_parts(self.share, micro_batch_size)
        self.steps_per_epoch = max_steps
        self.move_to(0, 0)

    def move_to(self, epoch: int, step: int) -> None:
        """Let the next iteration begin there."""
        self.epoch, self.first_step = epoch, step

    def __iter__(self) -> Iterator[Draw]:
        every = (
            (chunk, place)
            for chunk in self.stream.chunks(self.epoch, self.seed, self.part, self.chunk_rows)
            for place in range(len(chunk))
        )
        begun = False
        places = islice(every, self.first_step * self.batch_size, None)
        while len(batch := list(islice(places, self.batch_size))) == self.batch_size:
            mine = batch[self.process * self.share : (self.process + 1) * self.share]
            for start in range(0, self.share, self.micro_batch):
                yield self.draw(self.epoch, mine[start : start + self.micro_batch])
            begun = True
        if not begun and not self.first_step:
            raise DataError(
                f"{len(batch)} training samples do not fill one global batch of {self.batch_size}",
                where=self.stream.title,
                fix=f"lower --batch_size to at most {len(batch)}",
            )

    def draw(self, epoch: int, places: list[tuple[list[Row], int]]) -> Draw:
        rows = [chunk[place] for chunk, place in places]
        ids = np.array([row.id for row in rows])
        keys = keys_of(self.seed, epoch, ids, np.zeros(len(ids), np.int64))

        def spare(slot: int, attempt: int) -> Draw:
            """The next row of the chunk, after its last the first."""
            chunk, place = places[slot]
            row = chunk[(place + attempt) % len(chunk)]
            return Draw(np.array([row.id]), keys[slot : slot + 1], rows=as_rows([row]))

        return Draw(ids, keys, rows=as_rows(rows), spare=spare)


class SequentialEvalOrder:
    """EvalOrder for such a stream."""

    def __init__(
        self,
        stream: SequentialStream,
        part: Part | None,
        *,
        micro_batch_size: int,
        chunk_rows: int,
        process: int = 0,
        processes: int = 1,
    ):
        self.stream, self.part, self.chunk_rows = stream, part, chunk_rows
        self.together, self.process, self.processes = micro_batch_size * processes, process, processes

    def __iter__(self) -> Iterator[Draw]:
        rows = (row for chunk in self.stream.chunks(None, 0, self.part, self.chunk_rows) for row in chunk)
        while together := list(islice(rows, self.together)):
            places = np.array_split(np.arange(len(together)), self.processes)[self.process]
            counts = len(places) > 0
            mine = [together[place] for place in places] if counts else together[:1]
            ids = np.array([row.id for row in mine])
            yield Draw(ids, np.zeros(len(ids), np.uint64), counts, as_rows(mine))


def as_rows(rows: list[Row]) -> Rows:
    return Rows([row.picture for row in rows], array_of([row.label for row in rows]))
