"""Labels beside the one class: any number of classes a picture, and a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch

from configs.dataset_info import DatasetInfo
from configs.errors import DataError
from configs.options import Config
from data.columns import array_of, chosen_column, classes_of, is_missing, is_number
from data.labels import Cells, Column

NAMES = ("label", "labels", "class", "classes", "target", "targets", "tags")  # what such columns are often called


class MultiLabels:
    """Which classes a picture has: int8 [C] of 0 and 1 a sample, all -1 where nobody knows.

    Cells list the classes, by number or by name; or they have a 0 or 1 for each class.
    """

    name = "multi_label"

    def __init__(self, classes: list[str], columns: tuple[str, ...] = (), *, multi_hot: bool = False):
        self.classes, self.columns, self.multi_hot = classes, columns, multi_hot
        self.model_args = {"num_classes": len(classes)}
        self.blank = np.zeros(len(classes), np.int8)
        self.numbers = {name: number for number, name in enumerate(classes)}

    @classmethod
    def fits(cls, features: Mapping[str, Any]) -> bool:
        return bool(found_columns(features, is_list))

    @classmethod
    def open(
        cls, features: Mapping[str, Any], column: Column | None, config: Config, info: DatasetInfo, title: str
    ) -> Self:
        wanted = config.label_column or info.label_column
        label = chosen_column(dict(features), wanted, found_columns(features, is_list), "label", title)
        feature = features[label]
        if not is_list(feature):
            raise DataError(f"column {label!r} holds {feature}, no lists of classes", where=title)
        inner, length = item_of(feature), getattr(feature, "length", -1)
        if hasattr(inner, "names"):
            return cls(list(inner.names), (label,))
        if column is not None:
            known = [cell for cell in column(label) if not is_missing(cell)]
            if looks_multi_hot(known):
                return cls([str(number) for number in range(len(known[0]))], (label,), multi_hot=True)
            values = np.array([value for cell in known for value in cell])
            return cls(classes_of(inner, values, label, title), (label,))
        count = config.num_classes or info.classes or (length if length > 0 else 0)
        if not count or getattr(inner, "dtype", "") in ("string", "large_string"):
            raise DataError(
                f"column {label!r} does not tell the classes before the stream has been read",
                where=title,
                fix="number the classes and give --num_classes N, or save the data as parquet",
            )
        multi_hot = length > 0 or getattr(inner, "dtype", "").startswith(("bool", "float"))
        return cls([str(number) for number in range(count)], (label,), multi_hot=multi_hot)

    def read(self, cells: Cells, title: str, *, strict: bool = True) -> np.ndarray:
        labels = []
        for cell in cells[self.columns[0]]:
            label, fault = self.vector(cell)
            if fault and strict:
                raise DataError(fault, where=title)
            labels.append(label)
        return array_of(labels)

    def vector(self, cell: Any) -> tuple[np.ndarray, str]:
        """A cell's label, and what is wrong with the cell; then all of the label is -1."""
        unknown, count = np.full(len(self.classes), -1, np.int8), len(self.classes)
        if is_missing(cell):
            return unknown, ""
        if self.multi_hot:
            if len(cell) != count or not set(cell) <= {0, 1}:
                return unknown, f"label {list(cell)[:20]}: it must have a 0 or 1 for each of the {count} classes"
            return np.array(cell, np.int8), ""
        label = np.zeros(count, np.int8)
        for value in cell:
            number = self.numbers.get(value, -1) if isinstance(value, str) else int(value) if is_number(value) else -1
            if not 0 <= number < count:
                return unknown, f"label {value!r} is none of the {count} training classes"
            label[number] = 1
        return label, ""

    def absent(self, label: Any) -> bool:
        return bool(label[0] < 0)

    def fault(self, label: Any) -> str:
        return f"its label is missing, or has none of the {len(self.classes)} classes" if self.absent(label) else ""

    def faults(self, labels: np.ndarray) -> np.ndarray:
        return np.flatnonzero([self.absent(label) for label in labels])

    def check(self, labels: np.ndarray, title: str) -> None:
        counts_C = self.counts(labels)
        if not ((counts_C > 0) & (counts_C < len(labels))).any():
            raise DataError("no class is in some of the training pictures and not in others", where=title)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """The rarest class of each sample."""
        present_NC = np.stack(list(labels)) > 0
        counts_C = present_NC.sum(0)
        rarest = np.where(present_NC, counts_C, len(labels) + 1).argmin(1)
        return np.where(present_NC.any(1), rarest, len(self.classes))

    def counts(self, labels: np.ndarray) -> np.ndarray:
        return (np.stack(list(labels)) > 0).sum(0) if len(labels) else np.zeros(len(self.classes), np.int64)

    def collate(self, labels: np.ndarray) -> dict[str, Any]:
        return {"labels": torch.from_numpy(np.stack(list(labels)))}

    def __str__(self) -> str:
        return f"any of {len(self.classes)} classes"


class NumberLabels:
    """A number; NaN where there is none. float64 [N], in a batch float32 [B].

    mean, std: of the training rows, before any are held out; they are 0 and 1 for a stream that is read from the
    front. A model learns (number - mean) / std.
    """

    name = "numbers"
    blank = 0.0

    def __init__(self, column: str, mean: float = 0.0, std: float = 1.0):
        self.classes = [column]
        self.columns: tuple[str, ...] = (column,)
        self.mean, self.std = mean, std
        self.model_args = {"num_classes": 1}

    @classmethod
    def of(cls, column: str, values: np.ndarray) -> Self:
        """With the mean and std of the numbers that are known."""
        known = values[np.isfinite(values)]
        return cls(column, float(known.mean()), float(known.std()) or 1.0) if len(known) else cls(column)

    @classmethod
    def fits(cls, features: Mapping[str, Any]) -> bool:
        return bool(found_columns(features, is_float))

    @classmethod
    def open(
        cls, features: Mapping[str, Any], column: Column | None, config: Config, info: DatasetInfo, title: str
    ) -> Self:
        wanted = config.label_column or info.label_column
        label = chosen_column(dict(features), wanted, found_columns(features, is_float), "label", title)
        return cls.of(label, read_numbers(column(label), title)) if column is not None else cls(label)

    def read(self, cells: Cells, title: str, *, strict: bool = True) -> np.ndarray:
        return read_numbers(cells[self.columns[0]], title, strict=strict)

    def absent(self, label: Any) -> bool:
        return bool(np.isnan(label))

    def fault(self, label: Any) -> str:
        return "" if np.isfinite(label) else "its number is missing" if np.isnan(label) else f"its number is {label}"

    def faults(self, labels: np.ndarray) -> np.ndarray:
        return np.flatnonzero(~np.isfinite(labels))

    def check(self, labels: np.ndarray, title: str) -> None:
        different, learnt = (len(np.unique(numbers)) for numbers in (labels, labels.astype(np.float32)))
        if different < 2:
            raise DataError(f"all training samples have the same {self.classes[0]}", where=title)
        if learnt < different / 2:
            raise DataError(
                f"{different:,} different values of {self.classes[0]} are {learnt:,} in float32, which models learn",
                where=title,
                fix=f"subtract their mean {labels.mean():g} in the data, or scale them",
            )

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Tenths of the samples by their numbers."""
        known = labels[np.isfinite(labels)]
        edges = np.quantile(known, np.arange(1, 10) / 10) if len(known) else np.empty(0)
        return np.searchsorted(edges, labels)

    def counts(self, labels: np.ndarray) -> np.ndarray:
        return np.array([np.isfinite(labels).sum()])

    def collate(self, labels: np.ndarray) -> dict[str, Any]:
        return {"labels": torch.from_numpy(labels.astype(np.float32))}

    def __str__(self) -> str:
        return f"a number, {self.classes[0]}"


def read_numbers(cells: Sequence[Any] | np.ndarray, title: str, *, strict: bool = True) -> np.ndarray:
    """float64 [N]; NaN for a missing one. Text that is no number raises DataError where strict."""
    numbers = np.full(len(cells), np.nan)
    for place, cell in enumerate(cells):
        try:
            numbers[place] = np.nan if cell is None else float(cell)
        except (TypeError, ValueError):
            if strict:
                raise DataError(f"{cell!r} is no number", where=title, fix="--label_column NAME") from None
    return numbers


def is_list(feature: Any) -> bool:
    return item_of(feature) is not None


def item_of(feature: Any) -> Any:
    """What the lists of a column hold; None where it holds no lists of plain values."""
    inner = feature[0] if isinstance(feature, list) and len(feature) == 1 else getattr(feature, "feature", None)
    return inner if hasattr(inner, "dtype") and not isinstance(inner, dict) and not hasattr(inner, "feature") else None


def is_float(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith("float") and not is_list(feature)


def found_columns(features: Mapping[str, Any], fits: Any) -> list[str]:
    """The columns that fit; where some bear the name of labels, only of those."""
    named = [column for column in features if column in NAMES]
    return [column for column in named or features if fits(features[column])]


def looks_multi_hot(cells: Sequence[Any]) -> bool:
    """Whether each has a 0 or 1 for every class: then all are of one length, and one number may come twice."""
    lengths = {len(cell) for cell in cells}
    return (
        len(lengths) == 1
        and max(lengths) > 1
        and all(set(cell) <= {0, 1} for cell in cells if not isinstance(cell[0], str))
        and not isinstance(cells[0][0], str)
        and any(len(set(cell)) < len(cell) for cell in cells)
    )
