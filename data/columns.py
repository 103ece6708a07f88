"""Which columns of a Hugging Face dataset hold images and labels, and what the labels mean."""

from __future__ import annotations

from typing import Any

import numpy as np

from configs.errors import DataError
from configs.options import nearest


def image_column(features: dict[str, Any], wanted: str | None, name: str) -> str:
    from datasets import Image

    found = [column for column, feature in features.items() if isinstance(feature, Image)]
    return chosen_column(features, wanted, found, "image", name)


def label_column(features: dict[str, Any], wanted: str | None, name: str) -> str:
    from datasets import ClassLabel

    found = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    found += [column for column in features if column in ("label", "labels", "class", "target", "cls")]
    return chosen_column(features, wanted, found, "label", name)


def chosen_column(features: dict[str, Any], wanted: str | None, found: list[str], kind: str, name: str) -> str:
    columns = list(features)
    if wanted and wanted not in columns:
        raise DataError(
            f"no column {wanted!r}",
            where=name,
            fix=f"--{kind}_column: {nearest(wanted, columns)} (of {', '.join(columns)})",
        )
    if not wanted and not found:
        raise DataError(f"no {kind} column among {', '.join(columns)}", where=name, fix=f"name it with --{kind}_column")
    return wanted or found[0]


def values_of(dataset: Any, column: str) -> np.ndarray:
    return np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])


def classes_of(feature: Any, values: np.ndarray, column: str, name: str) -> list[str]:
    """Class names of a label column: its own, or the sorted distinct values."""
    if hasattr(feature, "names"):
        return list(feature.names)
    if values.dtype.kind in "iu":
        return [str(number) for number in range(int(values.max(initial=-1)) + 1)]
    if values.dtype.kind in "OSU" and all(isinstance(value, str) for value in values.tolist()):
        return sorted(set(values.tolist()))
    raise DataError(
        f"column {column!r} holds {feature}, no class labels",
        where=name,
        fix="name another one with --label_column",
    )


def numbers_of(values: np.ndarray, classes: list[str], name: str, *, strict: bool = True) -> np.ndarray:
    """Labels as class numbers, int64 [N]; a missing one is -1. Text is looked up among the classes: an unknown one
    raises DataError where strict, else it is -1 as well."""
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for value in values.tolist():
        if value is None or value != value:
            labels.append(-1)
        elif isinstance(value, (int, float)) and value == int(value):
            labels.append(int(value))
        elif str(value) in numbers or not strict:
            labels.append(numbers.get(str(value), -1))
        else:
            raise DataError(f"label {value!r} is none of the {len(classes)} training classes", where=name)
    return np.array(labels, np.int64)
