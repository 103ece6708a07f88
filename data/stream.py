"""Streams that tell how many rows they have: undecoded rows, a few blocks of them at hand at a time.

A reader knows blocks of rows: the row groups of parquet files, or every n-th sample of a source. The order
(data/order.py, Blocks) says which rows come when; nothing that is skipped is read.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from configs.errors import DataError
from data.columns import array_of, as_array
from data.labels import Labels
from data.order import Rows
from data.retry import patiently
from data.sources import Source, bytes_of_cell, channels_of_first

READERS = 4  # threads that fetch blocks


class Reader(Protocol):
    """Rows 0..size-1 in blocks; a row's number is its id."""

    kind: Labels
    size: int
    block_count: int

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The block of each id and its row there, int64 [B] each."""

    def read(self, block: int) -> Block:
        """The undecoded rows of a block. Raises DataError where it cannot be read."""

    def name(self, place: int) -> str: ...


class Block(Protocol):
    labels: np.ndarray  # [rows]; those that could not be read have a fault

    def picture(self, row: int) -> bytes: ...


class Stream:
    """The rows of a reader by id. The next blocks are fetched in the background."""

    in_memory = False

    def __init__(self, reader: Reader, open_blocks: int, channels: int | None = None):
        self.reader, self.open_blocks, self.kind = reader, open_blocks, reader.kind
        self.threads = ThreadPoolExecutor(READERS)
        self.blocks: OrderedDict[int, Future[Block]] = OrderedDict()
        self.channels = channels or channels_of_first(self, range(reader.size))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.reader.size

    def blocks_of(self, ids: np.ndarray) -> np.ndarray:
        return self.reader.locate(ids)[0]

    def blocks_from(self, ids: np.ndarray) -> list[int]:
        """The blocks of some ids, and the two after them."""
        blocks = np.unique(self.blocks_of(ids)).tolist()
        return [*blocks, *range(blocks[-1] + 1, min(blocks[-1] + 3, self.reader.block_count))]

    def fetch_ahead(self, blocks: Sequence[int]) -> None:
        """Begin to read what will be needed soon; forget what was needed longest ago."""
        self._begin(blocks)
        for block in blocks:
            self.blocks.move_to_end(block)
        while len(self.blocks) > max(len(blocks), 2 * self.open_blocks):
            self.blocks.popitem(last=False)

    def _begin(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block not in self.blocks:
                self.blocks[block] = self.threads.submit(self.reader.read, block)

    def rows(self, ids: np.ndarray) -> Rows:
        blocks, rows = self.reader.locate(ids)
        needed = list(dict.fromkeys(blocks.tolist()))
        self._begin(needed)
        try:
            opened = {block: self.blocks[block].result() for block in needed}
        except DataError:
            self.threads.shutdown(wait=False, cancel_futures=True)  # else leaving would wait for their patience
            self.threads, self.blocks = ThreadPoolExecutor(READERS), OrderedDict()
            raise
        pairs = [(opened[block], row) for block, row in zip(blocks.tolist(), rows.tolist())]
        return Rows(
            [block.picture(row) for block, row in pairs],
            array_of([block.labels[row] for block, row in pairs]),
        )

    def read(self, place: int) -> bytes:
        return self.rows(np.array([place])).pictures[0]

    def name(self, place: int) -> str:
        return self.reader.name(place)


class TableBlock:
    """A row group as Arrow keeps it."""

    def __init__(self, pictures: Any, labels: np.ndarray):
        self.pictures, self.labels = pictures, labels

    def picture(self, row: int) -> bytes:
        cell = self.pictures[row].as_py()
        try:
            return bytes_of_cell(cell, "")
        except DataError:
            return b""  # a missing picture is a bad sample, found where it is decoded


class ParquetReader:
    """Row groups of parquet files, local or remote (any path that fsspec opens). Their footers tell the row counts."""

    def __init__(self, files: Sequence[str], image_column: str, kind: Labels, facts: Footers):
        self.files, self.image_column, self.kind, self.facts = files, image_column, kind, facts
        self.groups = [(file, group) for file, footer in enumerate(facts) for group in range(footer.num_row_groups)]
        self.block_count = len(self.groups)
        lengths = [facts[file].row_group(group).num_rows for file, group in self.groups]
        self.starts = np.cumsum([0, *lengths])
        self.size = int(self.starts[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = np.searchsorted(self.starts, ids, side="right") - 1
        return blocks, ids - self.starts[blocks]

    def read(self, block: int) -> TableBlock:
        file, group = self.groups[block]
        path = self.files[file]
        return patiently(lambda: self._read(path, self.facts[file], group), path, remote=is_remote(path))

    def _read(self, path: str, footer: Any, group: int) -> TableBlock:
        import pyarrow.parquet

        columns = [self.image_column, *self.kind.columns]
        with open_file(path) as file:
            opened = pyarrow.parquet.ParquetFile(file, metadata=footer, pre_buffer=True)
            table = opened.read_row_group(group, columns=columns, use_threads=False)
        cells = {column: table.column(column).to_pylist() for column in self.kind.columns}
        labels = self.kind.read(cells, path, strict=False)
        return TableBlock(table.column(self.image_column).combine_chunks(), labels)

    def name(self, place: int) -> str:
        blocks, rows = self.locate(np.array([place]))
        file, group = self.groups[int(blocks[0])]
        before = sum(self.facts[file].row_group(number).num_rows for number in range(group))
        return f"{self.files[file]}, row {before + int(rows[0])}"


Footers = list[Any]  # pyarrow.parquet.FileMetaData of each file


def read_footers(files: Sequence[str]) -> Footers:
    """Row counts and columns of parquet files: a few kilobytes of each, 16 files at a time."""
    import pyarrow.parquet

    def read(path: str) -> Any:
        with open_file(path) as file:
            return pyarrow.parquet.read_metadata(file)

    with ThreadPoolExecutor(16) as threads:
        footers = threads.map(lambda path: patiently(lambda: read(path), path, remote=is_remote(path)), files)
        return list(tqdm(footers, "footers", len(files), disable=None if len(files) > 50 else True, leave=False))


def read_column(files: Sequence[str], column: str) -> np.ndarray:
    """One column of all files, without the others."""
    import pyarrow.parquet

    def read(path: str) -> list[Any]:
        with open_file(path) as file:
            return pyarrow.parquet.read_table(file, columns=[column]).column(column).to_pylist()

    with ThreadPoolExecutor(READERS) as threads:
        return as_array(
            sum(threads.map(lambda path: patiently(lambda: read(path), path, remote=is_remote(path)), files), [])
        )


def is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> Any:
    """A file that reads what is asked for and nothing ahead."""
    import fsspec

    options: dict[str, Any] = {}
    if path.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=30)  # seconds; else it waits 5 minutes
        options = {"client_kwargs": {"timeout": timeout}}
    files, inner = fsspec.core.url_to_fs(path, **options)
    return files.open(inner, "rb", cache_type="none") if is_remote(path) else files.open(inner, "rb")


class SourceReader:
    """Blocks of a source that is at hand: block b holds every n-th sample from b on, so that each has all classes."""

    def __init__(self, source: Source, rows_per_block: int):
        self.source, self.kind, self.size = source, source.kind, len(source.labels)
        self.block_count = max(1, round(self.size / rows_per_block))

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ids % self.block_count, ids // self.block_count

    def read(self, block: int) -> SourceBlock:
        places = range(block, self.size, self.block_count)
        return SourceBlock(
            [encoded(self.source, place) for place in places], self.source.labels[block :: self.block_count]
        )

    def name(self, place: int) -> str:
        return self.source.name(place)


class SourceBlock:
    def __init__(self, pictures: list[bytes], labels: np.ndarray):
        self.pictures, self.labels = pictures, labels

    def picture(self, row: int) -> bytes:
        return self.pictures[row]


def encoded(source: Source, place: int) -> bytes:
    """A picture as a stream carries it; pixels become a PNG. What cannot be read is empty: a bad sample."""
    try:
        picture = source.read(place)
    except DataError:
        return b""
    if isinstance(picture, bytes):
        return picture
    pixels = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()


class JoinedReader:
    """Several readers of the same classes, one after the other."""

    def __init__(self, parts: Sequence[Reader]):
        self.parts, self.kind = parts, parts[0].kind
        self.starts = np.cumsum([0, *(part.size for part in parts)])
        self.size = int(self.starts[-1])
        self.first_blocks = np.cumsum([0, *(part.block_count for part in parts)])
        self.block_count = int(self.first_blocks[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks, rows = np.empty_like(ids), np.empty_like(ids)
        owners = np.searchsorted(self.starts, ids, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            found, rows[mine] = self.parts[owner].locate(ids[mine] - self.starts[owner])
            blocks[mine] = found + self.first_blocks[owner]
        return blocks, rows

    def read(self, block: int) -> Block:
        owner = int(np.searchsorted(self.first_blocks, block, side="right")) - 1
        return self.parts[owner].read(block - int(self.first_blocks[owner]))

    def name(self, place: int) -> str:
        owner = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.parts[owner].name(place - int(self.starts[owner]))


def open_blocks(buffer_rows: int, reader: Reader) -> int:
    """How many blocks make up the shuffle buffer: at least four, so that blocks of one class are mixed."""
    return min(reader.block_count, max(4, -(-buffer_rows * reader.block_count // max(1, reader.size))))
