"""From a config to the data of a run: sources, splits, and datasets that make micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.dataset_info import DATASETS, IMAGENET_MEAN, IMAGENET_STD, DatasetInfo, find_dataset_info
from configs.errors import ConfigError, DataError
from configs.options import Config, nearest
from data.embedded import load_digits
from data.order import Draw, generator_kept, seed_cpu
from data.sources import ArrowSource, FolderSource, Source, TensorSource, classes_of
from data.splits import stratified_split

# A dataset of your own: a function that returns a Source. Its mean and std go into configs/dataset_info.py.
SOURCES: dict[str, Callable[[], Source]] = {"digits": load_digits}


@dataclass(frozen=True)
class Split:
    """Some samples of a source: ids are places in it, int64 [N], in ascending order."""

    source: Source
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Data:
    """What a run trains, validates and is tested on, and what its model has to know of it."""

    name: str
    train: Split
    val: Split | None
    test: Split | None
    classes: list[str]
    info: DatasetInfo
    image_size: int


class ImageDataset(torch.utils.data.Dataset):
    """Makes the micro-batch of a Draw: a pure function of it, in whichever loader process."""

    def __init__(self, source: Source, transform: Callable[[torch.Tensor], torch.Tensor] | None):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitems__(self, draw: Draw) -> dict[str, torch.Tensor] | DataError:
        """images_BCHW uint8, labels int64 [B], ids int64 [B]; a DataError is returned, since a loader
        process that raises would wrap it into a traceback."""
        try:
            images_BCHW = self._images(draw)
        except DataError as error:
            return error
        batch = {
            "images_BCHW": images_BCHW,
            "labels": torch.from_numpy(self.source.labels[draw.ids]),
            "ids": torch.from_numpy(draw.ids),
        }
        return batch if draw.counts else batch | {"valid": torch.zeros(len(draw.ids), dtype=torch.bool)}

    def _images(self, draw: Draw) -> torch.Tensor:
        if self.transform is None and isinstance(self.source, TensorSource):
            return self.source.images_NCHW[torch.from_numpy(draw.ids)]
        images = []
        with generator_kept():
            for place, key in zip(draw.ids.tolist(), draw.keys.tolist()):
                image = self.source.image(place)
                if self.transform is not None:
                    seed_cpu(key)
                    image = self.transform(image)
                images.append(image)
        return torch.stack(images)


def load_data(config: Config) -> Data:
    """Open the sources and cut the splits. Raises DataError before anything is trained on."""
    if config.train_data_dir:
        name, splits = config.train_data_dir, folder_splits(config)
        info = None
    else:
        name, info = config.dataset, find_dataset_info(config.dataset)
        if name in SOURCES:
            splits = {"train": whole(SOURCES[name]())}
        else:
            splits = hub_splits(config, info)
    splits = cut_missing_splits(splits, config)
    check_splits(splits, name)
    train = splits["train"]
    if info and info.classes not in (None, len(train.source.classes)):
        info = None  # a folder that only bears the name of a known dataset
    first = train.source.image(int(train.ids[0]))
    if config.channels and config.channels != len(first):
        raise ConfigError(f"--channels {config.channels}, but the images of {name} have {len(first)}")
    plain = unknown_dataset(len(first))
    info = info or plain
    if info.channels != len(first):
        info = replace(info, mean=plain.mean, std=plain.std)
    image_size = config.image_size or info.image_size or min(224, *first.shape[1:])
    return Data(name, train, splits.get("val"), splits.get("test"), train.source.classes, info, image_size)


def whole(source: Source) -> Split:
    return Split(source, np.arange(len(source.labels)))


def unknown_dataset(channels: int) -> DatasetInfo:
    """Photographs' statistics for colour; the middle of the range for grey."""
    return DatasetInfo(None, IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else DatasetInfo(None, (0.5,), (0.25,))


def folder_splits(config: Config) -> dict[str, Split]:
    """Image folders, each opened as it was given."""
    train = FolderSource(Path(str(config.train_data_dir)), config.channels)
    splits = {"train": whole(train)}
    for split, root in (("val", config.val_data_dir), ("test", config.test_data_dir)):
        if root:
            splits[split] = whole(FolderSource(Path(root), train.channels, train.classes))
    return splits


def hub_splits(config: Config, info: DatasetInfo | None) -> dict[str, Split]:
    """The splits of a Hugging Face dataset, from a local folder or the hub."""
    parts = open_hub_dataset(config.dataset, info)
    names = {
        "train": "train",
        "validation": "val",
        "val": "val",
        "valid": "val",
        "dev": "val",
        "test": "test",
    }
    if "train" not in parts:
        raise DataError(f"no train split, only {', '.join(parts)}", where=config.dataset)
    train = parts["train"]
    if not len(train):
        raise DataError("the train split is empty", where=config.dataset)
    known = info or DatasetInfo()
    image = image_column(train, config.image_column or known.image_column, config.dataset)
    label = label_column(train, config.label_column or known.label_column, config.dataset)
    classes = classes_of(train, label, config.dataset)
    channels = config.channels or (info.channels if info else None)
    splits: dict[str, Split] = {}
    for part, dataset in sorted(parts.items(), key=lambda item: item[0] != "train"):
        if part in names and len(dataset):
            source = ArrowSource(dataset, image, label, f"{config.dataset} ({part})", channels, classes)
            channels = source.channels
            splits[names[part]] = whole(source)
    return splits


def open_hub_dataset(name: str, info: DatasetInfo | None) -> dict[str, Any]:
    """load_from_disk or load_dataset, with their faults in one block."""
    import datasets

    folder = Path(name)
    known = (info and info.hub_id) or name
    if not folder.exists() and "/" not in known:
        raise DataError(
            f"no dataset is called {name!r}",
            where="--dataset",
            fix=f"a local folder, a hub id (user/name), or a name: {nearest(name, [*SOURCES, *DATASETS])}",
        )
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name if folder.is_dir() else known)
    except Exception as error:  # of many libraries: network, files, formats
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise DataError(
            f"cannot open the dataset: {lines[0][:300]}",
            where=f"--dataset {name}",
            fix="give a local folder that holds a dataset, or a hub id while the network is there",
        ) from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def image_column(dataset: Any, wanted: str | None, name: str) -> str:
    from datasets import Image

    found = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
    return chosen_column(dataset, wanted, found, "image", name)


def label_column(dataset: Any, wanted: str | None, name: str) -> str:
    from datasets import ClassLabel

    features = dataset.features.items()
    found = [column for column, feature in features if isinstance(feature, ClassLabel)]
    found += [column for column, _ in features if column in ("label", "labels", "class", "target")]
    return chosen_column(dataset, wanted, found, "label", name)


def chosen_column(dataset: Any, wanted: str | None, found: list[str], kind: str, name: str) -> str:
    columns = list(dataset.features)
    if wanted and wanted not in columns:
        raise DataError(
            f"no column {wanted!r}",
            where=name,
            fix=f"--{kind}_column: {nearest(wanted, columns)} (of {', '.join(columns)})",
        )
    if not wanted and not found:
        raise DataError(f"no {kind} column among {', '.join(columns)}", where=name, fix=f"name it with --{kind}_column")
    return wanted or found[0]


def cut_missing_splits(splits: dict[str, Split], config: Config) -> dict[str, Split]:
    """Hold out what is missing, stratified by class: validation always; a test set only from data that came whole."""
    train_share, val_share, test_share = config.split
    train = splits["train"]
    shares = {"train": train_share}
    if "val" not in splits:
        shares["val"] = val_share
        if "test" not in splits and not config.train_data_dir:
            shares["test"] = test_share
    if len(shares) > 1:
        parts = stratified_split(train.ids, train.source.labels[train.ids], list(shares.values()), config.split_seed)
        for split, ids in zip(shares, parts):
            if len(ids) or shares[split]:
                splits[split] = Split(train.source, ids)
    return splits


def check_splits(splits: dict[str, Split], name: str) -> None:
    """Refuse what cannot be learnt or measured, before the first step."""
    for part, split in splits.items():
        if not len(split):
            raise DataError(
                f"the {part} split is empty", where=name, fix="give more data, or larger shares with --split A B C"
            )
        if part != "test":  # often published without labels; scripts/test.py checks them when it opens it
            check_labels(split, part, name)
    present = np.unique(splits["train"].source.labels[splits["train"].ids])
    if len(present) < 2:
        raise DataError(
            f"training needs two classes or more, found {len(present)}: "
            f"{', '.join(splits['train'].source.classes[label] for label in present)}",
            where=name,
            fix="image folders hold one subfolder a class",
        )


def check_labels(split: Split, part: str, name: str) -> None:
    """Refuse labels that are no class numbers."""
    classes, labels = len(split.source.classes), split.source.labels[split.ids]
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"label {labels[wrong[0]]} at place {int(split.ids[wrong[0]])} of the {part} split: the {classes} classes "
            f"are numbered 0 to {classes - 1} ({len(wrong)} such labels)",
            where=name,
            fix="correct the labels, or name another column with --label_column",
        )
