"""What is learnt of each picture, and the plainest kind of it: one class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

import numpy as np
import torch

from configs.dataset_info import DatasetInfo
from configs.errors import DataError
from configs.options import Config
from data.columns import classes_of, label_column, numbers_of

Cells = Mapping[str, Any]  # of some rows, by the name of their column
Column = Callable[[str], np.ndarray]  # all values of a column by its name


class Labels(Protocol):
    """A kind of labels: where they are found, how their cells are read, and what a batch holds of them.

    The labels of N samples are an array [N]: of numbers, or of objects.
    """

    name: str  # of --labels
    classes: list[str]
    columns: tuple[str, ...]  # of a Hugging Face dataset
    model_args: dict[str, Any]  # what a model has to know of them
    blank: Any  # stands for the label of a sample that cannot be used

    @classmethod
    def fits(cls, features: Mapping[str, Any]) -> bool:
        """Whether a dataset of these columns is as a rule meant for labels of this kind."""

    @classmethod
    def open(
        cls, features: Mapping[str, Any], column: Column | None, config: Config, info: DatasetInfo, title: str
    ) -> Self:
        """Find the columns and the classes. column: None where the rows have not been read. Raises DataError."""

    def read(self, cells: Cells, title: str, *, strict: bool = True) -> np.ndarray:
        """Labels [N]. Where not strict, one that cannot be read becomes one with a fault."""

    def fault(self, label: Any) -> str:
        """Why a label cannot be learnt; "" where it can."""

    def faults(self, labels: np.ndarray) -> np.ndarray:
        """The places of labels with a fault."""

    def check(self, labels: np.ndarray, title: str) -> None:
        """Raises DataError where nothing can be learnt from these labels."""

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """What a split keeps the shares of, int64 [N]."""

    def counts(self, labels: np.ndarray) -> np.ndarray:
        """How often each class comes, int64 [classes]."""

    def collate(self, labels: np.ndarray) -> dict[str, Any]:
        """What a batch holds of them: tensors [B, ...], or lists of B."""

    def __str__(self) -> str:
        """Tells a user what is learnt: `10 classes`."""


class ClassLabels:
    """The number of a class; -1 where there is none. int64 [N]."""

    name = "classes"
    blank = 0

    def __init__(self, classes: list[str], columns: tuple[str, ...] = ()):
        self.classes, self.columns = classes, columns
        self.model_args = {"num_classes": len(classes)}

    @classmethod
    def fits(cls, features: Mapping[str, Any]) -> bool:
        return any(hasattr(feature, "names") for feature in features.values())

    @classmethod
    def open(
        cls, features: Mapping[str, Any], column: Column | None, config: Config, info: DatasetInfo, title: str
    ) -> Self:
        label = label_column(dict(features), config.label_column or info.label_column, title)
        if column is not None:
            values = np.empty(0) if hasattr(features[label], "names") else column(label)
            return cls(classes_of(features[label], values, label, title), (label,))
        count = config.num_classes or info.classes
        if not hasattr(features[label], "names") and not count:
            raise DataError(f"column {label!r} does not tell the classes", where=title, fix="give --num_classes N")
        if getattr(features[label], "dtype", None) in ("string", "large_string"):
            raise DataError(
                f"column {label!r} holds text, and the classes are not known before the stream has been read",
                where=title,
                fix="save the labels as numbers, or the data as parquet",
            )
        names = getattr(features[label], "names", None) or [str(number) for number in range(count or 0)]
        return cls(names, (label,))

    def read(self, cells: Cells, title: str, *, strict: bool = True) -> np.ndarray:
        return numbers_of(cells[self.columns[0]], self.classes, title, strict=strict)

    def absent(self, label: Any) -> bool:
        """Whether it is merely missing, as one of several labels may be."""
        return bool(label == -1)

    def fault(self, label: Any) -> str:
        if 0 <= label < len(self.classes):
            return ""
        if label == -1:
            return f"its label is missing, or none of the {len(self.classes)} training classes"
        return f"label {label}: the classes are numbered 0 to {len(self.classes) - 1}"

    def faults(self, labels: np.ndarray) -> np.ndarray:
        return np.flatnonzero((labels < 0) | (labels >= len(self.classes)))

    def check(self, labels: np.ndarray, title: str) -> None:
        present = np.unique(labels)
        if len(present) < 2:
            raise DataError(
                f"training needs two classes or more, found {len(present)}: "
                f"{', '.join(self.classes[label] for label in present)}",
                where=title,
                fix="image folders hold one subfolder a class; --label_column names the labels of other datasets",
            )

    def strata(self, labels: np.ndarray) -> np.ndarray:
        return labels

    def counts(self, labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels, minlength=len(self.classes))

    def collate(self, labels: np.ndarray) -> dict[str, Any]:
        return {"labels": torch.from_numpy(labels)}

    def __str__(self) -> str:
        return f"{len(self.classes)} classes"
