"""Which columns of a Hugging Face dataset hold images and labels, and what the labels mean."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from configs.errors import DataError, nearest

IMAGE_TYPES = ("string", "large_string", "binary", "large_binary")  # paths, or encoded images


def image_column(features: dict[str, Any], wanted: str | None, name: str) -> str:
    from datasets import Image

    found = [column for column, feature in features.items() if isinstance(feature, Image)]
    column = chosen_column(features, wanted, found, "image", name)
    feature = features[column]
    if not isinstance(feature, (Image, dict)) and getattr(feature, "dtype", None) not in IMAGE_TYPES:
        raise DataError(
            f"column {column!r} holds {feature}, no images",
            where=name,
            fix=f"--image_column: {', '.join(found) or 'a column of encoded images, or of their paths'}",
        )
    return column


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
        typed = ", ".join(f"{column} ({str(feature).split('(')[0]})" for column, feature in features.items())
        raise DataError(f"no {kind} column is marked as such among {typed}", where=name, fix=f"--{kind}_column NAME")
    return wanted or found[0]


def values_of(dataset: Any, column: str) -> np.ndarray:
    """All of a column, [N]; nested values as the Python objects they are, numbers that are missing as NaN."""
    from datasets import ClassLabel, Value

    if getattr(dataset.features[column], "dtype", "").startswith("float"):  # numpy's format would round to float32
        return dataset.select_columns([column]).with_format("arrow")[:][column].to_numpy()
    plain = isinstance(dataset.features[column], (ClassLabel, Value))
    return as_array(dataset.select_columns([column]).with_format("numpy" if plain else None)[:][column])


def as_array(values: Any) -> np.ndarray:
    """[N], of objects where the values are lists of several lengths."""
    if isinstance(values, np.ndarray) or not len(values) or not isinstance(values[0], (list, dict)):
        with suppress(ValueError):
            return np.asarray(values)
    return array_of(list(values))


def array_of(labels: list[Any]) -> np.ndarray:
    """Labels taken one by one as an array again: of numbers, or of objects as they are."""
    if isinstance(labels[0], (int, float, np.generic)):
        return np.array(labels)
    array = np.empty(len(labels), object)
    for place, label in enumerate(labels):
        array[place] = label
    return array


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and float(value).is_integer()


def classes_of(feature: Any, values: np.ndarray, column: str, name: str) -> list[str]:
    """Class names of a label column: its own, or the sorted distinct values."""
    if hasattr(feature, "names"):
        return list(feature.names)
    known = [value for value in values.tolist() if not is_missing(value)]
    if known and all(isinstance(value, str) for value in known):
        return sorted(set(known))
    if not known or not all(map(is_number, known)):
        raise DataError(
            f"column {column!r} holds {feature}, no class labels",
            where=name,
            fix="name another one with --label_column",
        )
    highest, distinct = int(max(known)), len(set(known))
    if highest > 1000 + 100 * distinct:
        raise DataError(
            f"column {column!r} holds {distinct} different numbers up to {highest:,}: they do not number classes",
            where=name,
            fix="number the classes from 0 on, or name another column with --label_column",
        )
    return [str(number) for number in range(highest + 1)]


def numbers_of(cells: Any, classes: list[str], name: str, *, strict: bool = True) -> np.ndarray:
    """Labels as class numbers, int64 [N]; a missing one is -1. Text is looked up among the classes: an unknown one
    raises DataError where strict, else it is -1 as well."""
    values = as_array(cells)
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for value in values.tolist():
        if is_missing(value):
            labels.append(-1)
        elif is_number(value):
            labels.append(int(value))
        elif str(value) in numbers or not strict:
            labels.append(numbers.get(str(value), -1))
        else:
            raise DataError(f"label {value!r} is none of the {len(classes)} training classes", where=name)
    return np.array(labels, np.int64)
