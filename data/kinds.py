"""The table of label kinds, and which of them a dataset is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from configs.dataset_info import DatasetInfo
from configs.errors import ConfigError
from configs.options import Config
from data.boxes import BoxLabels
from data.captions import CaptionLabels
from data.labels import ClassLabels, Column, Labels
from data.several import SeveralLabels
from data.targets import MultiLabels, NumberLabels

# The first whose columns are found is taken, unless --labels names one.
KINDS: dict[str, type[Labels]] = {
    "boxes": BoxLabels,
    "classes": ClassLabels,
    "captions": CaptionLabels,
    "multi_label": MultiLabels,
    "numbers": NumberLabels,
    "several": SeveralLabels,
}


def open_labels(
    features: Mapping[str, Any], column: Column | None, config: Config, info: DatasetInfo | None, title: str
) -> Labels:
    """The labels of a Hugging Face dataset. column: reads one whole; None of a stream that is read from the front."""
    info = info or DatasetInfo()
    kind = config.labels or ("several" if config.label_columns else info.labels)
    if kind is None:
        named = config.label_column if config.label_column in features else None
        looked_at = {named: features[named]} if named else features
        fitting = [name for name, labels in KINDS.items() if labels.fits(looked_at)]
        kind = fitting[0] if fitting else "classes"  # whose error tells what is missing
    return KINDS[kind].open(features, column, config, info, title)


def check_kind(labels: Labels, wanted: Sequence[str], task: str) -> None:
    """Refuse labels that the task cannot learn."""
    if labels.name not in wanted:
        raise ConfigError(
            f"--task {task} learns {' or '.join(wanted)}, and the data have {labels.name}",
            fix="choose another --task, or name the column that is meant with --label_column",
        )
