"""What a loader process does: from a Draw to a batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from configs.errors import DataError
from data.order import Draw
from data.sources import Source, TensorSource
from data.transforms import Transform


class ImageDataset(torch.utils.data.Dataset):
    """Makes the micro-batch of a Draw: a pure function of it, in whichever loader process."""

    def __init__(self, source: Source | None, transform: Transform, *, num_classes: int, channels: int):
        self.source, self.transform, self.num_classes, self.channels = source, transform, num_classes, channels

    def __len__(self) -> int:
        return 0  # a DataLoader asks; an order knows

    def __getitems__(self, draw: Draw) -> dict[str, Any]:
        """images_BCHW uint8, labels int64 [B], ids int64 [B]; `faults` [(slot, reason)] where samples are bad."""
        labels = draw.rows.labels if draw.rows is not None else self.source.labels[draw.ids]  # type: ignore[union-attr]
        faults: list[tuple[int, str]] = []
        images_BCHW = self.cut(draw, labels, faults)
        if faults and len(labels):
            labels = np.where((labels < 0) | (labels >= self.num_classes), 0, labels)
        batch = {
            "images_BCHW": self.transform.augment(images_BCHW, labels, draw.keys),
            "labels": torch.from_numpy(labels),
            "ids": torch.from_numpy(draw.ids),
        }
        if faults:
            batch["faults"] = faults  # type: ignore[assignment]
        return batch if draw.counts else batch | {"valid": torch.zeros(len(draw.ids), dtype=torch.bool)}

    def cut(self, draw: Draw, labels: np.ndarray, faults: list[tuple[int, str]]) -> torch.Tensor:
        """Squares, uint8 [B, C, S, S]; a bad sample is black and among the faults."""
        if isinstance(self.source, TensorSource) and draw.rows is None:
            images_BCHW = self.transform.cut_all(taken(self.source.images_NCHW, draw.ids))
            if images_BCHW is not None:
                bad = self.source.bad
                faults += (
                    [(slot, bad[place]) for slot, place in enumerate(draw.ids.tolist()) if place in bad] if bad else []
                )
                return images_BCHW
        size = self.transform.geometry.size
        images_BCHW = black((len(draw.ids), self.channels, size, size))
        for slot, (place, key) in enumerate(zip(draw.ids.tolist(), draw.keys.tolist())):
            try:
                if not 0 <= labels[slot] < self.num_classes:
                    raise DataError(f"label {labels[slot]}: the classes are numbered 0 to {self.num_classes - 1}")
                picture = draw.rows.pictures[slot] if draw.rows is not None else self.source.read(place)  # type: ignore[union-attr]
                images_BCHW[slot] = self.transform.cut(picture, key, self.channels)
            except DataError as error:
                faults.append((slot, error.what))
        return images_BCHW


def black(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 zeros; in a loader process in shared memory at once, as in torch's collate: sending it copies nothing."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(shared, 0, list(shape))  # type: ignore[call-overload]


def taken(images_NCHW: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    """Some images: numpy's copy takes a tenth of the time of torch's indexing."""
    return torch.from_numpy(images_NCHW.numpy().take(ids, axis=0))
