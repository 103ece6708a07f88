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
from torchvision.io import write_png
from tqdm import tqdm

import models
from configs.arguments import make_config
from configs.errors import ConfigError, DataError
from data.box_dataset import BoxTransform, eval_box_transform
from data.boxes import NONE
from data.decode import decode
from data.sources import is_hidden
from data.transforms import Transform, eval_transform
from scripts.wiring import TRAINERS, look_at_views
from trainer.detection_trainer import with_boxes

Row = dict[str, Any]


def predict_files(
    weights: str, inputs: list[Path], batch_size: int, *, tta: bool = False, draw: Path | None = None
) -> Iterator[Row]:
    """A row for each image: path and what the task predicts (label, probability); or path and error for a file that is
    no image.

    Weights and inputs are looked at before the first row is asked for. draw: a folder for the pictures with boxes.
    """
    model = models.load(weights)
    if draw is not None and "boxes" not in TRAINERS[model.task].kinds:
        raise ConfigError(f"--draw draws boxes, and the task of this model is {model.task}", where=weights)
    rows = predictions(model, list(image_files(inputs)), batch_size, tta=tta)
    return rows if draw is None else drawn(rows, draw)


def predictions(model: models.BaseModel, paths: list[Path], batch_size: int, *, tta: bool = False) -> Iterator[Row]:
    trainer = TRAINERS[model.task](make_config(task=model.task), model)
    if tta:
        look_at_views(trainer)
    size, channels = model.image_size or 224, len(model.mean_C11)
    of_boxes = "boxes" in trainer.kinds
    transform: Transform | BoxTransform = eval_box_transform(size) if of_boxes else eval_transform(size)
    bar = tqdm(total=len(paths), unit="image", disable=None)
    remaining = iter(paths)
    while chunk := list(islice(remaining, batch_size)):
        rows: list[Row] = []
        images, sizes = [], []
        for path in chunk:
            rows.append({"path": str(path)})
            try:
                if isinstance(transform, BoxTransform):
                    image, _, own = transform(path.read_bytes(), NONE, 0, channels)
                    sizes.append(own)
                else:
                    image = transform.cut(path.read_bytes(), 0, channels)
                images.append(image)
            except OSError as error:
                rows[-1]["error"] = f"cannot read the file: {error.strerror}"
            except DataError as error:
                rows[-1]["error"] = error.what
        if images:
            found = trainer.inference(torch.stack(images))
            if of_boxes:
                found = [in_own_pixels(one, height, width, size) for one, (height, width) in zip(found, sizes)]
            for row, prediction in zip((row for row in rows if "error" not in row), trainer.as_rows(found)):
                row |= prediction
        bar.update(len(chunk))
        yield from rows
    bar.close()


def in_own_pixels(found: dict[str, torch.Tensor], height: int, width: int, size: int) -> dict[str, torch.Tensor]:
    """Detections of a square of this size in the pixels of the picture that it was made of."""
    scale = torch.tensor([width, height, width, height], device=found["boxes"].device) / size
    return found | {"boxes": found["boxes"] * scale}


def drawn(rows: Iterable[Row], folder: Path) -> Iterator[Row]:
    """The rows as they come; the pictures with their boxes are written into a folder as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        if "boxes" in row:
            path = Path(row["path"])
            picture_CHW = decode(path.read_bytes(), str(path), 3)
            write_png(with_boxes(picture_CHW, row), str(folder / f"{number:06d}_{path.stem}.png"))
        yield row


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
                table.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in row.items()})
            else:
                file.write(json.dumps(row) + "\n")
    return counts[False], counts[True]
