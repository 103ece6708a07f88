"""Folders of images with a file of captions."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configs.errors import DataError
from data.captions import NAMES, CaptionLabels, as_labels, texts_of
from data.labels import Labels
from data.sources import FolderSource, channels_of_first

FILES = ("captions.jsonl", "captions.csv")
PATH_NAMES = ("file_name", "file", "image", "path")


class CaptionedFolder(FolderSource):
    """Images and a file with a line for each caption: the image's path below root, and the caption, or a list of them
    (JSON lines). Images of which the file does not speak are left out."""

    def __init__(self, root: Path, file: Path, channels: int | None, like: Labels | None):
        captions: dict[str, tuple[str, ...]] = {}
        for path, texts in lines_of(file):
            path = os.path.normpath(path)
            captions[path] = captions.get(path, ()) + texts
        if not captions:
            raise DataError("there is no caption", where=str(file))
        self.root, self.origin = root, str(root.absolute())
        self.paths = [root / path for path in sorted(captions)]
        self.labels: np.ndarray = as_labels(captions[path] for path in sorted(captions))
        self.kind: Labels = like or CaptionLabels(self.labels)
        self.channels = channels or channels_of_first(self, range(len(self.paths)))


def lines_of(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """An image's path and captions of each line. Raises DataError for a line that has no path, or no JSON."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.DictReader(opened) if file.suffix == ".csv" else (json.loads(x) for x in opened if x.strip())
            for number, row in enumerate(rows, 1):
                path = next((row[name] for name in PATH_NAMES if row.get(name)), None)
                cell = next((row[name] for name in NAMES if row.get(name)), None)
                if not isinstance(path, str):
                    raise DataError(
                        f"entry {number} names no image", where=str(file),
                        fix=f"name it in one of {', '.join(PATH_NAMES)}, the caption in one of {', '.join(NAMES)}",
                    )  # fmt: skip
                yield path, texts_of(cell)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"cannot read the captions: {error}", where=str(file)) from None
