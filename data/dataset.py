"""From a config to the samples of training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from configs.dataset_info import IMAGENET_MEAN, IMAGENET_STD, DatasetInfo, find_dataset_info
from configs.errors import ConfigError, DataError
from configs.options import Config
from data import hub
from data.captions import CaptionLabels
from data.decode import decode
from data.embedded import SOURCES
from data.labels import Labels
from data.sequential import SequentialStream
from data.split import Split
from data.stream import Stream
from data.streamed import streamed_splits
from data.whole import whole_splits

OF_TABLES = ("image_column", "label_column", "label_columns")


@dataclass(frozen=True)
class Data:
    """What a run trains and validates on, and what its model has to know of it."""

    name: str
    train: Split
    val: Split | None
    test: Split | None  # opened for scripts/test.py alone
    kind: Labels  # of what is learnt, with its classes
    info: DatasetInfo
    image_size: int
    held_out: int = 0  # samples kept back for a test

    @property
    def classes(self) -> list[str]:
        return self.kind.classes


def load_data(config: Config, *, test: bool = False) -> Data:
    """Open the sources and cut the splits. Raises DataError before anything is trained on."""
    name = config.train_data_dir or hub.title(config)
    given = [option for option in OF_TABLES if getattr(config, option)]
    if given and name in SOURCES and not config.data_files:
        raise ConfigError(
            f"--{given[0]} names columns of a Hugging Face dataset, and {name} is embedded: it has none",
            fix="leave it out",
        )
    info = find_dataset_info(config.dataset) if name == config.dataset else None
    splits = (streamed_splits if config.streaming else whole_splits)(config, info, test=test)
    held_out = len(splits["test"]) if "test" in splits else 0
    if not test:
        splits.pop("test", None)
    check_splits(splits, name)
    train = splits["train"]
    kind = train.source.kind
    if info and info.classes not in (None, len(kind.classes)):
        info = None  # a folder that only bears the name of a known dataset
    channels, height, width = first_shape(train, name)
    if config.channels and config.channels != channels:
        raise ConfigError(f"--channels {config.channels}, but the images of {name} have {channels}")
    plain = unknown_dataset(channels)
    if isinstance(kind, CaptionLabels):
        plain = replace(plain, horizontal_flip=False)  # a caption may say `left`
    info = info or plain
    if info.channels != channels:
        info = replace(info, mean=plain.mean, std=plain.std)
    image_size = config.image_size or info.image_size or min(224, height, width)
    return Data(name, train, splits.get("val"), splits.get("test"), kind, info, image_size, held_out)


def first_shape(split: Split, name: str) -> tuple[int, int, int]:
    """Channels, height and width of the first image that is one; a broken one must not stop a run."""
    source, fault = split.source, None
    rows = source.rows(None, 0) if isinstance(source, SequentialStream) else split.ids.tolist()
    for row in islice(rows, 100):
        try:
            picture = row.picture if isinstance(source, SequentialStream) else source.read(row)
            image = decode(picture, name, source.channels) if isinstance(picture, bytes) else picture
            return tuple(image.shape)
        except DataError as error:
            fault = fault or error
    raise fault or DataError("there is no image", where=name)


def unknown_dataset(channels: int) -> DatasetInfo:
    """Photographs' statistics for colour; the middle of the range for grey."""
    return DatasetInfo(None, IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else DatasetInfo(None, (0.5,), (0.25,))


def with_cache(data: Data, config: Config, *, shown: bool) -> Data:
    """The same data, decoded and resized once, where `--cache` asks for it."""
    if config.cache == "none" or data.train.source.in_memory:
        return data
    try:
        from data.cache import cached
    except ImportError:  # of fcntl
        raise ConfigError("--cache needs the file locks of Linux or macOS", fix="leave it out") from None
    stored: dict[int, Any] = {}
    for split in (data.train, data.val):
        if split is not None and id(split.source) not in stored:
            stored[id(split.source)] = cached(split.source, data.image_size, where=config.cache, shown=shown)  # type: ignore[arg-type]
    train = replace(data.train, source=stored[id(data.train.source)])
    val = replace(data.val, source=stored[id(data.val.source)]) if data.val is not None else None
    return replace(data, train=train, val=val)


def check_splits(splits: dict[str, Split], name: str) -> None:
    """Refuse what cannot be learnt or measured, before the first step."""
    for part, split in splits.items():
        if split.counted and not len(split):
            raise DataError(
                f"the {part} split is empty", where=name, fix="give more data, or larger shares with --split A B C"
            )
        # a test split is often published without labels; scripts/test.py checks them when it opens it
        if part != "test" and not split.streamed:
            check_labels(split, part, name)
    if splits["train"].streamed:
        return
    splits["train"].source.kind.check(splits["train"].labels, name)


def check_labels(split: Split, part: str, name: str) -> None:
    """Refuse labels that cannot be learnt."""
    source, labels = split.source, split.labels
    assert not isinstance(source, Stream | SequentialStream)
    wrong = source.kind.faults(labels)
    if len(wrong):
        raise DataError(
            f"{source.name(int(split.ids[wrong[0]]))} of the {part} split: {source.kind.fault(labels[wrong[0]])} "
            f"({len(wrong)} such labels)",
            where=name,
            fix="correct the labels, or name another column with --label_column",
        )
