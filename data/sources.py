"""Where pictures and labels come from: tensors in memory, folders of files, Hugging Face datasets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from configs.errors import DataError
from data.decode import channels_of
from data.labels import ClassLabels, Labels


class Source(Protocol):
    """What a dataset has to offer. Ids are the places 0..N-1; they never change within a run."""

    kind: Labels  # of what is learnt, with its classes
    labels: np.ndarray  # [N], of that kind
    channels: int
    in_memory: bool
    origin: str  # where all of it lies, whatever its content

    def read(self, place: int) -> bytes | torch.Tensor:
        """An encoded picture, or pixels uint8 [C, H, W]. Raises DataError where there is none."""

    def name(self, place: int) -> str:
        """What messages call it."""

    def sizes(self) -> np.ndarray | None:
        """Bytes of each encoded picture, int64 [N], without reading it; None for pixels."""

    def fingerprint(self) -> str:
        """Changes when the content does."""


class TensorSource:
    """Images that fit in memory: uint8 [N, C, H, W]."""

    in_memory = True
    origin = "memory"

    def __init__(self, images_NCHW: torch.Tensor, labels: np.ndarray, kind: Labels | list[str]):
        """kind: the names of the classes that the labels number, or labels of another kind."""
        self.kind: Labels = ClassLabels(kind) if isinstance(kind, list) else kind
        self.images_NCHW = images_NCHW
        self.labels = labels if labels.dtype.kind in "Of" else labels.astype(np.int64)
        self.channels = images_NCHW.shape[1]
        self.bad: dict[int, str] = {}  # places without a picture, and why

    def read(self, place: int) -> torch.Tensor:
        return self.images_NCHW[place]

    def name(self, place: int) -> str:
        return f"image {place}"

    def sizes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images_NCHW.numpy().tobytes()).hexdigest()


class FileSource:
    """Pictures in files below a folder."""

    in_memory = False
    kind: Labels
    labels: np.ndarray
    channels: int
    paths: list[Path]
    root: Path
    origin: str

    def read(self, place: int) -> bytes:
        try:
            with open(self.paths[place], "rb", buffering=0) as file:  # 20 us less than Path.read_bytes
                return file.read()
        except OSError as error:
            raise DataError(f"cannot read the file: {error.strerror}", where=self.name(place)) from None

    def name(self, place: int) -> str:
        return str(self.paths[place])

    def sizes(self) -> np.ndarray:
        return np.array([size_of_file(path) for path in self.paths], np.int64)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(str(path.relative_to(self.root)).encode() + facts_of_file(path))
        return digest.hexdigest()


class FolderSource(FileSource):
    """`root/class/image.png`; the classes are the sorted names of the subfolders."""

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
        classes, known = classes or found, bool(classes)
        if strange := [name for name in found if name not in classes]:
            raise DataError(
                f"class folder {strange[0]!r} is none of the {len(classes)} training classes",
                where=str(root),
            )
        self.kind = ClassLabels(classes)
        numbers = {name: number for number, name in enumerate(classes)}
        self.root, self.origin = root, str(root.absolute())
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
        empty = sorted(set(range(len(found))) - set(self.labels.tolist())) if not known else []
        if empty:
            raise DataError(
                f"class folder {found[empty[0]]!r} holds no images", where=str(root), fix="fill or remove it"
            )
        self.channels = channels or channels_of_first(self, range(len(self.paths)))


def facts_of_file(path: Path) -> bytes:
    """What changes when the file's content does."""
    try:
        facts = path.stat()
    except OSError:
        return b"gone"
    return f"{path}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode()


def size_of_file(path: Path) -> int:
    """In bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


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
        labels: np.ndarray,
        title: str,
        channels: int | None,
        kind: Labels,
    ):
        from datasets import Image as ImageFeature

        self.title, self.origin, self.kind, self.labels = title, os.path.abspath(title), kind, labels
        self.rows, self.column = dataset.cast_column(image_column, ImageFeature(decode=False)), image_column
        self.channels = channels or channels_of_first(self, range(len(self.rows)))

    def read(self, place: int) -> bytes:
        return bytes_of_cell(self.rows[place][self.column], self.name(place))

    def name(self, place: int) -> str:
        return f"{self.title}, row {place}"

    def sizes(self) -> np.ndarray:
        sizes, paths = self._sizes_and_paths()
        for place, path in paths.items():
            sizes[place] = size_of_file(Path(path))
        return sizes

    def _sizes_and_paths(self) -> tuple[np.ndarray, dict[int, str]]:
        """Bytes of the pictures in the table, int64 [N], 0 for the others; and where those lie."""
        import pyarrow.compute as pc

        column = self.rows.with_format("arrow").select_columns([self.column])[:].column(self.column)
        sizes = pc.fill_null(pc.binary_length(pc.struct_field(column, "bytes")), 0).to_numpy().astype(np.int64)
        elsewhere = pc.struct_field(column, "path").filter(pc.equal(sizes, 0)).to_pylist()
        paths = zip(np.flatnonzero(sizes == 0).tolist(), elsewhere)
        return sizes, {place: path for place, path in paths if path}

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.rows._fingerprint} {self.column}".encode())
        for path in self._sizes_and_paths()[1].values():
            digest.update(facts_of_file(Path(path)))
        return digest.hexdigest()


def bytes_of_cell(cell: dict[str, Any] | str | bytes | None, name: str) -> bytes:
    """The encoded picture of an undecoded image cell: bytes, a path, or a struct of both."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None
    if content is not None:
        return content
    path = path_of_cell(cell)
    if not path:
        raise DataError("there is no image", where=name)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the file {path}: {error.strerror}", where=name) from None


def path_of_cell(cell: dict[str, Any] | str | bytes | None) -> str | None:
    """Where the picture of a cell without bytes lies."""
    return cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None


class JoinedSource:
    """Several sources of the same classes, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self.parts, self.kind, self.channels = parts, parts[0].kind, parts[0].channels
        self.in_memory = all(part.in_memory for part in parts)
        self.origin = " and ".join(part.origin for part in parts)
        self.labels = np.concatenate([part.labels for part in parts])
        self.starts = np.cumsum([0, *(len(part.labels) for part in parts)])

    def _find(self, place: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.parts[part], place - int(self.starts[part])

    def read(self, place: int) -> bytes | torch.Tensor:
        part, place = self._find(place)
        return part.read(place)

    def name(self, place: int) -> str:
        part, place = self._find(place)
        return part.name(place)

    def sizes(self) -> np.ndarray | None:
        sizes = [part.sizes() for part in self.parts]
        return None if any(size is None for size in sizes) else np.concatenate(sizes)  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        return " ".join(part.fingerprint() for part in self.parts)


def channels_of_first(source: Source, places: Sequence[int], tries: int = 100) -> int:
    """1 or 3, from the header of the first picture that has one; a broken one must not stop a run."""
    fault: DataError | None = None
    for place in places[:tries]:
        try:
            picture = source.read(place)
            return channels_of(picture, source.name(place)) if isinstance(picture, bytes) else len(picture)
        except DataError as error:
            fault = fault or error
    raise fault or DataError("there is no image")
