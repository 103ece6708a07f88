"""Boxes of objects as labels: for each picture some boxes, each with a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from configs.dataset_info import DatasetInfo
from configs.errors import DataError, nearest
from configs.options import Config
from data.columns import classes_of, is_number
from data.labels import Cells, Column

CATEGORIES = ("category", "categories", "label", "labels", "category_id")  # what the class of a box is called
COLUMN = "objects"  # the usual name of the column


@dataclass(frozen=True, eq=False, slots=True)
class Boxes:
    """The objects of one picture: boxes_xyxy float32 [n, 4] in pixels of the upright picture, classes int64 [n]."""

    boxes_xyxy: np.ndarray
    classes: np.ndarray
    fault: str = ""  # why they cannot be learnt

    def __len__(self) -> int:
        return len(self.classes)


NONE = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


class BoxLabels:
    """Boxes and their classes, one `Boxes` a sample. Boxes without area are left out, and counted in `dropped`."""

    name = "boxes"
    blank = NONE

    def __init__(self, classes: list[str], columns: tuple[str, ...] = (), category: str = CATEGORIES[0]):
        self.classes, self.columns, self.category = classes, columns, category
        self.model_args = {"num_classes": len(classes)}
        self.dropped = 0

    @classmethod
    def fits(cls, features: Mapping[str, Any]) -> bool:
        return any("bbox" in fields_of(feature) for feature in features.values())

    @classmethod
    def open(
        cls, features: Mapping[str, Any], column: Column | None, config: Config, info: DatasetInfo, title: str
    ) -> Self:
        objects = objects_column(features, config.label_column or info.label_column, title)
        fields = fields_of(features[objects])
        category = next((name for name in CATEGORIES if name in fields), None)
        if category is None:
            raise DataError(
                f"column {objects!r} has boxes without a class: it holds {', '.join(fields)}",
                where=title,
                fix=f"call the class of a box {CATEGORIES[0]!r}",
            )
        size = tuple(name for name in ("width", "height") if name in features)
        kind = cls([], (objects, *(size if len(size) == 2 else ())), category)
        feature = innermost(fields[category])
        if hasattr(feature, "names"):
            kind.classes = list(feature.names)
        elif column is not None:
            values = [value for cell in column(objects) for value in pairs_of(cell, category)[1]]
            kind.classes = classes_of(feature, np.array(values), f"{objects}.{category}", title)
        elif config.num_classes:
            kind.classes = [str(number) for number in range(config.num_classes)]
        else:
            raise DataError(f"column {objects!r} does not tell the classes", where=title, fix="give --num_classes N")
        kind.model_args = {"num_classes": len(kind.classes)}
        return kind

    def read(self, cells: Cells, title: str, *, strict: bool = True) -> np.ndarray:
        objects, *size = (cells[column] for column in self.columns)
        numbers = {name: number for number, name in enumerate(self.classes)}
        labels = np.empty(len(objects), object)
        for place, cell in enumerate(objects):
            width, height = (float(side[place] or np.inf) for side in size) if size else (np.inf, np.inf)
            try:
                boxes, names = pairs_of(cell, self.category)
                labels[place] = self.boxes(boxes, [numbers.get(name, name) for name in names], width, height)
            except (TypeError, ValueError, AttributeError, KeyError):
                labels[place] = Boxes(*empty(), fault="its boxes are no [x, y, width, height] with a class each")
        return labels

    def boxes(self, boxes_xywh: Sequence[Any], names: Sequence[Any], width: float, height: float) -> Boxes:
        """Of one picture; names: class numbers, or what is no class. Invalid boxes are left out."""
        boxes = np.array(boxes_xywh, np.float64).reshape(-1, 4)
        if len(boxes) != len(names):
            return Boxes(*empty(), fault=f"it has {len(boxes)} boxes and {len(names)} classes")
        known = [is_number(name) and 0 <= name < len(self.classes) for name in names]
        fault = ""
        if not all(known):
            strange = names[known.index(False)]
            fault = f"the class {strange!r} of a box is none of the {len(self.classes)} training classes"
        boxes[:, 2:] += boxes[:, :2]
        valid = is_valid(boxes, width, height)
        self.dropped += int((~valid).sum())
        classes = np.array([int(name) if good else -1 for name, good in zip(names, known)], np.int64)
        return Boxes(boxes[valid].astype(np.float32), classes[valid], fault)

    def fault(self, label: Any) -> str:
        return label.fault

    def faults(self, labels: np.ndarray) -> np.ndarray:
        return np.flatnonzero([bool(label.fault) for label in labels])

    def check(self, labels: np.ndarray, title: str) -> None:
        if not any(map(len, labels)):
            raise DataError("no training picture has a box", where=title, fix="look at the boxes of the data")

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """The rarest class of a picture, so that each part of a split has some of it; -1 without boxes."""
        counts_C = self.counts(labels)
        return np.array(
            [min(label.classes.tolist(), key=lambda c: (counts_C[c], c), default=-1) for label in labels], np.int64
        )

    def counts(self, labels: np.ndarray) -> np.ndarray:
        """Boxes of each class."""
        known = [label.classes[label.classes >= 0] for label in labels]
        return np.bincount(np.concatenate([*known, NONE.classes]), minlength=len(self.classes))

    def collate(self, labels: np.ndarray) -> dict[str, Any]:
        """boxes_BM4 float32 and labels_BM int64, filled with -1 up to the most boxes of a picture, at least 1."""
        most = max(1, *map(len, labels))
        boxes_BM4, labels_BM = torch.full((len(labels), most, 4), -1.0), torch.full((len(labels), most), -1)
        for slot, label in enumerate(labels):
            boxes_BM4[slot, : len(label)] = torch.from_numpy(label.boxes_xyxy)
            labels_BM[slot, : len(label)] = torch.from_numpy(label.classes)
        return {"boxes_BM4": boxes_BM4, "labels_BM": labels_BM}

    def __str__(self) -> str:
        left_out = f", {self.dropped:,} boxes without area inside the picture left out" if self.dropped else ""
        return f"boxes of {len(self.classes)} classes{left_out}"


def empty() -> tuple[np.ndarray, np.ndarray]:
    return NONE.boxes_xyxy, NONE.classes


def is_valid(boxes_xyxy: np.ndarray, width: float = np.inf, height: float = np.inf) -> np.ndarray:
    """Which boxes [N, 4] are finite and have an area inside a picture of this size, bool [N]."""
    left, top, right, bottom = boxes_xyxy.T
    with np.errstate(invalid="ignore"):
        inside = (np.minimum(right, width) > np.maximum(left, 0)) & (np.minimum(bottom, height) > np.maximum(top, 0))
    return np.isfinite(boxes_xyxy).all(1) & inside


def objects_column(features: Mapping[str, Any], wanted: str | None, title: str) -> str:
    """The column of the boxes: the one that is named, `objects`, or the first that holds boxes."""
    found = sorted((name for name, feature in features.items() if "bbox" in fields_of(feature)), key=COLUMN.__ne__)
    if wanted and wanted not in found:
        raise DataError(
            f"column {wanted!r} holds no boxes" if wanted in features else f"no column {wanted!r}",
            where=title,
            fix=f"--label_column: {', '.join(found) or nearest(wanted, list(features))}",
        )
    if not found:
        raise DataError(
            "no column holds boxes", where=title, fix="one of lists of {bbox: [x, y, width, height], category}"
        )
    return wanted or found[0]


def fields_of(feature: Any) -> dict[str, Any]:
    """The fields of a struct of lists, or of a list of structs; none of any other column."""
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, (list, tuple)) and feature:
        feature = feature[0]
    return dict(feature) if isinstance(feature, dict) else {}


def innermost(feature: Any) -> Any:
    """What the lists of a feature hold."""
    while not hasattr(feature, "names") and hasattr(feature, "feature"):
        feature = feature.feature
    return feature[0] if isinstance(feature, list) else feature


def pairs_of(cell: Any, category: str) -> tuple[list[Any], list[Any]]:
    """The boxes and the classes of one cell; none where there is nothing."""
    if cell is None:
        return [], []
    if isinstance(cell, Mapping):
        boxes, names = cell["bbox"], cell[category]
        return ([] if boxes is None else list(boxes)), ([] if names is None else list(names))
    return [one["bbox"] for one in cell], [one[category] for one in cell]
