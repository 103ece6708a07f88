"""Splits of data that are at hand as a whole: in memory, in folders, in tables on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from configs.dataset_info import DatasetInfo, find_dataset_info
from configs.errors import ConfigError, DataError
from configs.options import Config
from data import hub
from data.box_folders import has_part
from data.embedded import SOURCES
from data.folders import open_folder
from data.sources import ArrowSource, JoinedSource, Source, TensorSource
from data.split import Split, check_classes, missing_shares, more_datasets, with_more
from data.splits import grouped_split, stratified_split


def whole_splits(config: Config, info: DatasetInfo | None, *, test: bool) -> dict[str, Split]:
    """The splits that are given, and those that are cut out of the training data."""
    sources = open_sources(config, info, test=test)
    splits = cut_missing_splits({part: whole(source) for part, source in sources.items()}, config)
    more = [open_sources(one, find_dataset_info(one.dataset), test=False)["train"] for one in more_datasets(config)]
    if more:
        every = [sources["train"], *more]
        check_classes(every, config)
        mixture = joined(every)
        for part, split in splits.items():
            if part != "train" and split.source is sources["train"]:  # one source for both, one cache
                splits[part] = replace(split, source=mixture)
        splits["train"] = with_more(splits["train"], mixture, [len(source.labels) for source in more])
    return splits


def open_sources(config: Config, info: DatasetInfo | None, *, test: bool) -> dict[str, Source]:
    """A source for each split that is given; the test split only where it is asked for."""
    if config.train_data_dir:
        root = Path(config.train_data_dir)
        train = open_folder(root, config.channels)
        sources: dict[str, Source] = {"train": train}
        for part, given in (("val", config.val_data_dir), ("test", config.test_data_dir)):
            if (given or has_part(root, part)) and (test or part != "test"):
                sources[part] = open_folder(Path(given or root), train.channels, train.kind, part)
        return sources
    if config.dataset in SOURCES and not config.data_files:
        found = SOURCES[config.dataset]()
        parts = found if isinstance(found, dict) else {"train": found}
        return {part: source for part, source in parts.items() if test or part != "test"}
    return dict(hub.whole_sources(config, info, test=test))


def whole(source: Source) -> Split:
    return Split(source, np.arange(len(source.labels)))


def cut_missing_splits(splits: dict[str, Split], config: Config) -> dict[str, Split]:
    """Hold out what is missing: stratified by class, or with every group in one split."""
    train, shares = splits["train"], missing_shares(list(splits), config)
    groups = groups_of_training(splits, config) if config.group_column else None
    if len(shares) > 1:
        amounts, strata = list(shares.values()), train.source.kind.strata(train.labels)
        if groups is not None:
            try:
                parts = grouped_split(
                    train.ids, groups, train.source.kind.strata(train.labels), amounts, config.split_seed
                )
            except DataError as error:
                error.where = f"{hub.title(config)}, column {config.group_column}"
                raise
        else:
            parts = stratified_split(train.ids, strata, amounts, config.split_seed)
        for part, ids in zip(shares, parts):
            if len(ids) or shares[part]:
                splits[part] = Split(train.source, ids)
    return splits


def groups_of_training(splits: dict[str, Split], config: Config) -> np.ndarray:
    """The group of each training sample, [N]. Raises DataError where another split that is given shares one."""
    groups = {}
    for part, split in splits.items():
        if not isinstance(split.source, ArrowSource):
            raise ConfigError(
                "--group_column names a column of a Hugging Face dataset, and these data have none",
                fix="give the folder to --dataset, with a metadata.csv that holds the column",
            )
        groups[part] = hub.groups_of(split.source, str(config.group_column))
    known = set(groups["train"].tolist())
    for part, values in groups.items():
        if part != "train" and (common := sorted(known & set(values.tolist()), key=str)):
            raise DataError(
                f"{len(common):,} values of --group_column {config.group_column} are in both the training "
                f"and the {part} split: {', '.join(map(str, common[:3]))}{', ...' if len(common) > 3 else ''}",
                where=hub.title(config),
                fix="leave --group_column out, or give one split and let --split cut it",
            )
    return groups["train"]


def joined(sources: Sequence[Source]) -> Source:
    """Several sources as one; images of one size in memory stay so."""
    if any(source.in_memory and source.channels != sources[0].channels for source in sources):
        channels = " and ".join(str(source.channels) for source in sources)
        raise ConfigError(f"datasets of {channels} channels in memory cannot be mixed")
    tensors = [source for source in sources if isinstance(source, TensorSource)]
    if len(tensors) < len(sources) or len({source.images_NCHW.shape[1:] for source in tensors}) > 1:
        return JoinedSource(sources)
    images_NCHW = torch.cat([source.images_NCHW for source in tensors])
    return TensorSource(images_NCHW, np.concatenate([source.labels for source in tensors]), sources[0].kind)
