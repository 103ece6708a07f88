"""Files in, rows of predictions out."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

import models
from configs.arguments import make_config
from configs.errors import DataError
from data.sources import is_hidden
from data.transforms import eval_transform
from scripts.wiring import TRAINERS, look_at_views

Row = dict[str, Any]


def predict_files(weights: str, inputs: list[Path], batch_size: int, *, tta: bool = False) -> Iterator[Row]:
    """A row for each image: path and what the task predicts (label, probability); or path and error for a file that is
    no image.

    Weights and inputs are looked at before the first row is asked for.
    """
    return predictions(models.load(weights), list(image_files(inputs)), batch_size, tta=tta)


def predictions(model: models.BaseModel, paths: list[Path], batch_size: int, *, tta: bool = False) -> Iterator[Row]:
    trainer = TRAINERS[model.task](make_config(task=model.task), model)
    if tta:
        look_at_views(trainer)
    transform, channels = eval_transform(model.image_size or 224), len(model.mean_C11)
    bar = tqdm(total=len(paths), unit="image", disable=None)
    remaining = iter(paths)
    while chunk := list(islice(remaining, batch_size)):
        rows: list[Row] = []
        images = []
        for path in chunk:
            rows.append({"path": str(path)})
            try:
                images.append(transform.cut(path.read_bytes(), 0, channels))
            except OSError as error:
                rows[-1]["error"] = f"cannot read the file: {error.strerror}"
            except DataError as error:
                rows[-1]["error"] = error.what
        if images:
            found = trainer.as_rows(trainer.inference(torch.stack(images)))
            for row, prediction in zip((row for row in rows if "error" not in row), found):
                row |= prediction
        bar.update(len(chunk))
        yield from rows
    bar.close()


def image_files(inputs: list[Path]) -> Iterator[Path]:
    """Files as they were given; the images of a folder and of those in it, by name."""
    for path in inputs:
        if path.is_dir():
            found = [
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in IMG_EXTENSIONS and file.is_file() and not is_hidden(file, path)
            ]
            if not found:
                raise DataError("no images found", where=str(path), fix=f"they end with {', '.join(IMG_EXTENSIONS)}")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise DataError("no such file or folder", where=str(path))


def write(rows: Iterable[Row], output: Path) -> tuple[int, int]:
    """Rows as JSON lines or CSV, as they come; how many predictions and how many errors."""
    counts = {False: 0, True: 0}
    rows = iter(rows)
    held: list[Row] = []  # until the first prediction tells the columns
    for row in rows if output.suffix == ".csv" else ():
        held.append(row)
        if "error" not in row:
            break
    columns = ["path", *(name for name in (held[-1] if held else {}) if name not in ("path", "error")), "error"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.DictWriter(file, columns)
        if output.suffix == ".csv":
            table.writeheader()
        for row in chain(held, rows):
            counts["error" in row] += 1
            if output.suffix == ".csv":
                table.writerow(row)
            else:
                file.write(json.dumps(row) + "\n")
    return counts[False], counts[True]
