"""A split: some samples of a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.errors import DataError
from configs.options import Config
from data.sequential import Part, SequentialStream
from data.sources import Source
from data.stream import Stream


@dataclass(frozen=True)
class Split:
    """ids are places in the source, int64 [N], in ascending order."""

    source: Source | Stream | SequentialStream
    ids: np.ndarray  # empty for a stream that does not tell how many it has
    part: Part | None = None  # the share of such a stream that is meant
    cuts: tuple[int, ...] = (0,)  # where the samples of each dataset begin among the ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def counted(self) -> bool:
        return not isinstance(self.source, SequentialStream)

    @property
    def streamed(self) -> bool:
        return isinstance(self.source, (Stream, SequentialStream))

    @property
    def labels(self) -> np.ndarray:
        """[N], of data at hand: a stream does not tell them."""
        assert not isinstance(self.source, (Stream, SequentialStream))
        return self.source.labels[self.ids]


def missing_shares(given: Sequence[str], config: Config) -> dict[str, float]:
    """Shares of the training data: validation where it is missing; a test set only from data that came whole."""
    train_share, val_share, test_share = config.split
    shares = {"train": train_share}
    if "val" not in given:
        shares["val"] = val_share
        if "test" not in given and not config.train_data_dir:
            shares["test"] = test_share
    return shares


def more_datasets(config: Config) -> list[Config]:
    """How each of `--mix_datasets` is opened."""
    plain = replace(config, train_data_dir=None, val_data_dir=None, data_files=(), mix_datasets=(), mix_weights=())
    return [replace(plain, dataset=name) for name in config.mix_datasets]


def with_more(split: Split, source: Any, sizes: Sequence[int]) -> Split:
    """The split in a joined source, with all samples of the datasets that follow its own."""
    first_of_extra = len(split.source) if isinstance(split.source, Stream) else len(split.source.labels)  # type: ignore[union-attr]
    ids = np.concatenate([split.ids, first_of_extra + np.arange(sum(sizes))])
    cuts = len(split.ids) + np.cumsum([0, *sizes[:-1]])
    return Split(source, ids, cuts=(0, *cuts.tolist()))


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_classes(sources: Sequence[Any], config: Config) -> None:
    """Datasets that are mixed have the same classes in the same order."""
    for name, source in zip(config.mix_datasets, sources[1:]):
        classes, first = source.kind.classes, sources[0].kind.classes
        if source.kind.name != sources[0].kind.name:
            raise DataError(
                f"it has {source.kind.name}, and the first dataset {sources[0].kind.name}",
                where=f"--mix_datasets {name}",
            )
        if classes != first:
            raise DataError(
                f"its {len(classes)} classes ({few(classes)}) are not the "
                f"{len(first)} of the first dataset ({few(first)})",
                where=f"--mix_datasets {name}",
                fix="mix datasets of the same classes in the same order",
            )
