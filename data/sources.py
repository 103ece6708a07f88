"""Where images and labels come from: tensors in memory, folders of files, Hugging Face datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from configs.errors import DataError
from data.decode import channels_of, open_image, to_tensor


class Source(Protocol):
    """What a dataset has to offer. Ids are the places 0..N-1; they never change within a run."""

    classes: list[str]
    labels: np.ndarray  # int64 [N]
    in_memory: bool

    def image(self, place: int) -> torch.Tensor:
        """uint8 [C, H, W] of any height and width."""


class TensorSource:
    """Images that fit in memory: uint8 [N, C, H, W]."""

    in_memory = True

    def __init__(self, images_NCHW: torch.Tensor, labels: np.ndarray, classes: list[str]):
        self.images_NCHW, self.labels, self.classes = images_NCHW, labels.astype(np.int64), classes

    def image(self, place: int) -> torch.Tensor:
        return self.images_NCHW[place]


class FolderSource:
    """`root/class/image.png`; the classes are the sorted names of the subfolders."""

    in_memory = False

    def __init__(self, root: Path, channels: int | None = None, classes: list[str] | None = None):
        from torchvision.datasets.folder import IMG_EXTENSIONS

        if not root.is_dir():
            raise DataError(
                "no such folder of images", where=str(root), fix="it holds one subfolder a class, with images"
            )
        found = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and folder.name[0] != ".")
        if found and not classes and set(found) <= {"train", "val", "valid", "validation", "test"}:
            raise DataError(
                f"the subfolders are splits ({', '.join(found)}), not classes",
                where=str(root),
                fix=f"give each its own flag: --train_data_dir {root / found[0]} --val_data_dir ...",
            )
        self.classes = classes or found
        if strange := [name for name in found if name not in self.classes]:
            raise DataError(
                f"class folder {strange[0]!r} is none of the {len(self.classes)} training classes",
                where=str(root),
            )
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.paths = [
            path
            for name in found
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in IMG_EXTENSIONS and path.is_file() and not is_hidden(path, root)
        ]
        if not self.paths:
            raise DataError("no images found", where=str(root), fix="put them in one subfolder a class: cat/1.png")
        depth = len(root.parts)
        self.labels = np.array([numbers[path.parts[depth]] for path in self.paths], np.int64)
        empty = sorted(set(range(len(found))) - set(self.labels.tolist())) if not classes else []
        if empty:
            raise DataError(
                f"class folder {found[empty[0]]!r} holds no images", where=str(root), fix="fill or remove it"
            )
        self.channels = channels or channels_of(open_image(self.paths[0], str(self.paths[0])))

    def image(self, place: int) -> torch.Tensor:
        path = self.paths[place]
        return to_tensor(open_image(path, str(path)), self.channels, str(path))


def is_hidden(path: Path, root: Path) -> bool:
    """Whether a name below root begins with a dot: thumbnails, notebooks' checkpoints, a Mac's notes."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


class ArrowSource:
    """One split of a Hugging Face dataset; images stay undecoded until they are asked for."""

    in_memory = False

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        label_column: str,
        name: str,
        channels: int | None,
        classes: list[str],
    ):
        from datasets import Image as ImageFeature

        self.name, self.classes = name, classes
        self.labels = numbers_of(dataset, label_column, classes, name)
        self.rows, self.column = dataset.cast_column(image_column, ImageFeature(decode=False)), image_column
        self.channels = channels or channels_of(self._open(0))

    def _open(self, place: int) -> Any:
        cell = self.rows[place][self.column]
        return open_image(cell["bytes"] or Path(cell["path"]), f"{self.name}, row {place}")

    def image(self, place: int) -> torch.Tensor:
        return to_tensor(self._open(place), self.channels, f"{self.name}, row {place}")


def numbers_of(dataset: Any, label_column: str, classes: list[str], name: str) -> np.ndarray:
    """The label column as class numbers, int64 [N]; text is looked up among the classes."""
    values = np.asarray(dataset.select_columns([label_column]).with_format("numpy")[:][label_column])
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = [value for value in values.tolist() if str(value) not in numbers]
    if unknown:
        raise DataError(f"label {unknown[0]!r} is none of the {len(classes)} training classes", where=name)
    return np.array([numbers[str(value)] for value in values], np.int64)


def classes_of(dataset: Any, label_column: str, name: str) -> list[str]:
    """Class names of a label column: its own, or the sorted distinct values."""
    feature = dataset.features[label_column]
    if hasattr(feature, "names"):
        return list(feature.names)
    values = np.asarray(dataset.select_columns([label_column]).with_format("numpy")[:][label_column])
    if values.dtype.kind in "iu":
        return [str(number) for number in range(int(values.max(initial=-1)) + 1)]
    if values.dtype.kind in "OSU" and all(isinstance(value, str) for value in values.tolist()):
        return sorted(set(values.tolist()))
    raise DataError(
        f"column {label_column!r} holds {feature}, no class labels",
        where=name,
        fix="name another one with --label_column",
    )
