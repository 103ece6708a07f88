"""Hugging Face datasets: opened from the hub or the disk, whole or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from configs.dataset_info import DATASETS, DatasetInfo
from configs.errors import DataError, nearest
from configs.options import Config
from data.columns import image_column, values_of
from data.kinds import open_labels
from data.sequential import SequentialStream
from data.sources import ArrowSource
from data.stream import ParquetReader, Reader, SourceReader, is_remote, read_column, read_footers

SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "dev": "val", "test": "test"}
FORMATS = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
ROWS_PER_BLOCK = 64  # of sources that are cut into blocks for a stream


def title(config: Config) -> str:
    """What messages call the dataset."""
    return config.data_files[0] if config.data_files and config.dataset == "digits" else config.dataset


def arguments(config: Config, info: DatasetInfo | None) -> dict[str, Any]:
    """What `datasets` has to open."""
    files = list(config.data_files)
    if files and config.dataset == "digits":
        suffix = Path(files[0].split("?")[0]).suffix.lower()
        if suffix not in FORMATS:
            raise DataError(
                f"files of an unknown kind: {suffix or 'no suffix'}",
                where=f"--data_files {files[0]}",
                fix=f"one of {', '.join(FORMATS)}",
            )
        return {"path": FORMATS[suffix], "data_files": files}
    name = config.dataset
    known = (info and info.hub_id) or name
    if not Path(name).exists() and "/" not in known:
        raise DataError(
            f"no dataset is called {name!r}",
            where="--dataset",
            fix=f"a local folder, a hub id (user/name), or a name: {nearest(name, ['digits', *DATASETS])}",
        )
    return {"path": name if Path(name).is_dir() else known} | ({"data_files": files} if files else {})


@contextmanager
def opening(name: str) -> Iterator[None]:
    """The faults of many libraries (network, files, formats) in one block."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise DataError(
            f"cannot open the dataset: {lines[0][:300]}",
            where=name,
            fix="give a local folder that holds a dataset, or a hub id while the network is there",
        ) from None


def open_whole(config: Config, info: DatasetInfo | None) -> dict[str, Any]:
    """Its splits as tables, downloaded where they are not at hand; empty ones are left out."""
    import datasets

    wanted, folder = arguments(config, info), Path(config.dataset)
    with opening(title(config)):
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(config.dataset)
        else:
            loaded = datasets.load_dataset(**wanted)
    return named(dict(loaded) if isinstance(loaded, dict) else {"train": loaded}, title(config))


def named(parts: dict[str, Any], name: str) -> dict[str, Any]:
    """By our names of splits, train first. Raises DataError where there is nothing to train on."""
    found = {SPLITS[part]: data for part, data in parts.items() if part in SPLITS}
    if "train" not in found:
        raise DataError(f"no train split, only {', '.join(parts)}", where=name)
    return {part: found[part] for part in ("train", "val", "test") if part in found}


def whole_sources(config: Config, info: DatasetInfo | None, *, test: bool) -> dict[str, ArrowSource]:
    """A source for each split; the test split only where it is asked for."""
    tables, name, known = open_whole(config, info), title(config), info or DatasetInfo()
    train = tables["train"]
    if not len(train):
        raise DataError("the train split is empty", where=name)
    image = image_column(train.features, config.image_column or known.image_column, name)
    kind = open_labels(train.features, lambda column: values_of(train, column), config, info, name)
    channels = config.channels or (info.channels if info else None)
    sources: dict[str, ArrowSource] = {}
    for part, table in tables.items():
        if len(table) and (test or part != "test"):
            where = f"{name} ({part})"
            labels = kind.read({column: values_of(table, column) for column in kind.columns}, where)
            sources[part] = ArrowSource(table, image, labels, where, channels, kind)
            channels = sources[part].channels
    return sources


def groups_of(source: ArrowSource, column: str) -> np.ndarray:
    """The values of `--group_column`, [N]."""
    if column not in source.rows.features:
        columns = list(source.rows.features)
        raise DataError(f"no column {column!r}", where=source.title, fix=f"--group_column: {nearest(column, columns)}")
    return values_of(source.rows, column)


def open_stream(
    config: Config, info: DatasetInfo | None, *, test: bool
) -> dict[str, Reader] | dict[str, SequentialStream]:
    """Readers of its splits where row counts are known without reading the rows; else sequential streams."""
    import datasets

    name = title(config)
    folder = Path(config.dataset)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # Arrow files: rows are at hand
        return as_readers(whole_sources(config, info, test=test))
    with opening(name):
        builder = datasets.load_dataset_builder(**arguments(config, info))
    kinds = {kind.__name__ for kind in type(builder).__mro__}
    files = {str(part): [str(file) for file in found] for part, found in (builder.config.data_files or {}).items()}
    parts = {part: found for part, found in named(files or {"train": []}, name).items() if test or part != "test"}
    for part, found in parts.items():
        if not found:
            raise DataError(f"no file of the {part} split was found", where=name, fix="check --data_files or --dataset")
    if "ImageFolder" in kinds and not any(map(is_remote, parts["train"])):  # the table holds paths, no pixels
        return as_readers(whole_sources(config, info, test=test))
    if "Parquet" in kinds:
        return parquet_readers(parts, builder.info.features, config, info)
    return sequential_streams(config, info, parts)


def as_readers(sources: dict[str, Any]) -> dict[str, Reader]:
    return {part: SourceReader(source, ROWS_PER_BLOCK) for part, source in sources.items()}


def parquet_readers(
    parts: dict[str, list[str]], features: Any, config: Config, info: DatasetInfo | None
) -> dict[str, Reader]:
    import datasets

    name, known = title(config), info or DatasetInfo()
    footers = {part: read_footers(files) for part, files in parts.items()}
    if features is None:
        features = datasets.Features.from_arrow_schema(footers["train"][0].schema.to_arrow_schema())
    image = image_column(features, config.image_column or known.image_column, name)
    kind = open_labels(features, lambda column: read_column(parts["train"], column), config, info, name)
    for part, files in parts.items():
        for file, footer in zip(files, footers[part]):
            if missing := {image, *kind.columns} - set(footer.schema.to_arrow_schema().names):
                raise DataError(f"the {part} split has no column {missing.pop()!r}", where=file)
    return {part: ParquetReader(files, image, kind, footers[part]) for part, files in parts.items()}


def sequential_streams(
    config: Config, info: DatasetInfo | None, parts: dict[str, list[str]]
) -> dict[str, SequentialStream]:
    import datasets

    name, known = title(config), info or DatasetInfo()
    if not config.max_steps:
        raise DataError(
            "the stream does not tell how many samples it has",
            where=name,
            fix="give --max_steps, or save the data as parquet, which tells",
        )
    with opening(name):
        loaded = datasets.load_dataset(**arguments(config, info), streaming=True)
        tables = {part: table for part, table in named(dict(loaded), name).items() if part in parts}
        train = tables["train"]
        train = train if train.features else train._resolve_features()
    image = image_column(train.features, config.image_column or known.image_column, name)
    kind = open_labels(train.features, None, config, info, name)
    remote = any(is_remote(file) for files in parts.values() for file in files)
    return {
        part: SequentialStream(table, image, kind, f"{name} ({part})", remote=remote) for part, table in tables.items()
    }
