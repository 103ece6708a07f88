"""Several labels a picture, each of its own kind: some may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np

from configs.dataset_info import DatasetInfo
from configs.errors import DataError
from configs.options import Config
from data.columns import array_of
from data.labels import Cells, ClassLabels, Column
from data.targets import MultiLabels, NumberLabels, is_float, is_list

Part = ClassLabels | MultiLabels | NumberLabels


class SeveralLabels:
    """A tuple a sample, with the label of each part; a part's name is its column's. One label of them must be known."""

    name = "several"

    def __init__(self, parts: dict[str, Part]):
        self.parts = parts
        self.columns = tuple(column for part in parts.values() for column in part.columns)
        self.classes = [
            name if isinstance(part, NumberLabels) else f"{name}/{label}"
            for name, part in parts.items()
            for label in part.classes
        ]
        self.model_args = {"heads": {name: len(part.classes) for name, part in parts.items()}}
        self.blank = tuple(part.blank for part in parts.values())

    @classmethod
    def fits(cls, features: Mapping[str, Any]) -> bool:
        return False  # --label_columns asks for it

    @classmethod
    def open(
        cls, features: Mapping[str, Any], column: Column | None, config: Config, info: DatasetInfo, title: str
    ) -> Self:
        names = config.label_columns
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise DataError("several labels need two columns or more", where=title, fix="--label_columns NAME NAME ...")
        parts: dict[str, Part] = {}
        for name in names:
            kind = kind_of(features.get(name))
            parts[name] = kind.open(features, column, replace(config, label_column=name, label_columns=()), info, title)
        return cls(parts)

    def read(self, cells: Cells, title: str, *, strict: bool = True) -> np.ndarray:
        columns = [part.read(cells, f"{title}, column {name}", strict=strict) for name, part in self.parts.items()]
        return array_of(list(zip(*columns)))

    def of_part(self, labels: np.ndarray, name: str) -> np.ndarray:
        """The labels of one part, [N]."""
        place = list(self.parts).index(name)
        return array_of([label[place] for label in labels])

    def known(self, labels: np.ndarray, name: str) -> np.ndarray:
        """The labels of one part that are not missing."""
        values, part = self.of_part(labels, name), self.parts[name]
        return values[[not part.absent(value) for value in values]]

    def fault(self, label: Any) -> str:
        missing = 0
        for (name, part), value in zip(self.parts.items(), label):
            if part.absent(value):
                missing += 1
            elif fault := part.fault(value):
                return f"{name}: {fault}"
        return "all of its labels are missing" if missing == len(self.parts) else ""

    def faults(self, labels: np.ndarray) -> np.ndarray:
        return np.flatnonzero([bool(self.fault(label)) for label in labels])

    def check(self, labels: np.ndarray, title: str) -> None:
        for name, part in self.parts.items():
            known, where = self.known(labels, name), f"{title}, column {name}"
            if not len(known):
                raise DataError("no training sample has this label", where=where)
            part.check(known, where)

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Those of the first part."""
        name, part = next(iter(self.parts.items()))
        return part.strata(self.of_part(labels, name))

    def counts(self, labels: np.ndarray) -> np.ndarray:
        return np.concatenate([part.counts(self.known(labels, name)) for name, part in self.parts.items()])

    def collate(self, labels: np.ndarray) -> dict[str, Any]:
        return {
            f"labels/{name}": part.collate(self.of_part(labels, name))["labels"] for name, part in self.parts.items()
        }

    def __str__(self) -> str:
        return "; ".join(f"{name}: {part}" for name, part in self.parts.items())


def kind_of(feature: Any) -> type[Part]:
    """What a column is for, by its type: whole numbers and text name classes."""
    return MultiLabels if is_list(feature) else NumberLabels if is_float(feature) else ClassLabels
