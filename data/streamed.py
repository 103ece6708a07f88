"""Splits of streams: nothing but row counts and the first rows are read before the first step."""

from __future__ import annotations

from itertools import islice

import numpy as np

from configs.dataset_info import DatasetInfo, find_dataset_info
from configs.errors import ConfigError, DataError
from configs.options import Config
from data import hub
from data.captions import CaptionLabels
from data.decode import channels_of
from data.embedded import SOURCES
from data.sequential import Part, SequentialStream
from data.split import Split, check_classes, missing_shares, more_datasets, with_more
from data.splits import part_of
from data.stream import JoinedReader, Reader, Stream, open_blocks
from data.whole import open_sources

ROWS_FOR_WORDS = 10_000  # of captions, whose words a tokenizer learns
NOT_COUNTED = np.empty(0, np.int64)


def streamed_splits(config: Config, info: DatasetInfo | None, *, test: bool) -> dict[str, Split]:
    """The splits that are given; a missing one is cut out of the training rows by their ids alone."""
    parts = open_parts(config, info, test=test)
    more = [open_parts(one, find_dataset_info(one.dataset), test=False)["train"] for one in more_datasets(config)]
    readers = {part: reader for part, reader in parts.items() if not isinstance(reader, SequentialStream)}
    more_readers = [reader for reader in more if not isinstance(reader, SequentialStream)]
    if len(more_readers) < len(more) or (more and len(readers) < len(parts)):
        raise ConfigError("--mix_datasets cannot mix in a stream that does not tell how many samples it has")
    if len(readers) < len(parts):
        return sequential_splits(config, {p: s for p, s in parts.items() if isinstance(s, SequentialStream)})
    check_classes([readers["train"], *more_readers], config)
    return counted_splits(config, info, readers, more_readers)


def open_parts(config: Config, info: DatasetInfo | None, *, test: bool) -> dict[str, Reader | SequentialStream]:
    if config.train_data_dir or (config.dataset in SOURCES and not config.data_files):
        return dict(hub.as_readers(open_sources(config, info, test=test)))
    return dict(hub.open_stream(config, info, test=test))


def counted_splits(
    config: Config, info: DatasetInfo | None, readers: dict[str, Reader], more: list[Reader]
) -> dict[str, Split]:
    """Of streams that tell how many rows they have."""
    train = readers["train"]
    if not train.size:
        raise DataError("the train split is empty", where=hub.title(config))
    channels = config.channels or (info.channels if info else None)
    stream = Stream(train, open_blocks(config.shuffle_buffer, train), channels)
    splits = {"train": Split(stream, np.arange(train.size))}
    for part in readers.keys() - {"train"}:
        other = Stream(readers[part], open_blocks(config.shuffle_buffer, readers[part]), stream.channels)
        splits[part] = Split(other, np.arange(readers[part].size))
    shares = missing_shares(list(splits), config)
    if len(shares) > 1:
        ids = np.arange(train.size)
        numbers = part_of(ids, list(shares.values()), config.split_seed)
        found = {part: ids[numbers == number] for number, part in enumerate(shares)}
        splits |= {part: Split(stream, ids) for part, ids in found.items() if len(ids) or shares[part]}
    if more:
        reader = JoinedReader([train, *more])
        everything = Stream(reader, open_blocks(config.shuffle_buffer, reader), stream.channels)
        splits["train"] = with_more(splits["train"], everything, [one.size for one in more])
    return splits


def sequential_splits(config: Config, streams: dict[str, SequentialStream]) -> dict[str, Split]:
    """Of streams that have to be read to be counted."""
    train = streams["train"]
    channels = config.channels or channels_of_first_row(train)
    if isinstance(train.kind, CaptionLabels):
        train.kind.learn(row.label for row in islice(train.rows(None, 0), ROWS_FOR_WORDS))
    for stream in streams.values():
        stream.channels = channels
    shares = missing_shares(list(streams), config)
    splits = {part: Split(stream, NOT_COUNTED) for part, stream in streams.items()}
    if len(shares) > 1:
        amounts = tuple(shares.values())
        cut = {part: Part(number, amounts, config.split_seed) for number, part in enumerate(shares) if shares[part]}
        splits |= {part: Split(train, NOT_COUNTED, where) for part, where in cut.items()}
    return splits


def channels_of_first_row(stream: SequentialStream, tries: int = 100) -> int:
    """1 or 3, from the first row with a picture."""
    fault: DataError | None = None
    for row, _ in zip(stream.rows(None, 0), range(tries)):
        try:
            return channels_of(row.picture, stream.name(row.id))
        except DataError as error:
            fault = fault or error
    raise fault or DataError("the stream has no rows", where=stream.title)
