"""What a loader process does: from a Draw to a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from configs.errors import DataError
from data.labels import Labels
from data.order import Draw
from data.sources import Source, TensorSource
from data.transforms import Transform


class PictureDataset(torch.utils.data.Dataset):
    """Makes the micro-batch of a Draw: a pure function of it, in whichever loader process."""

    def __init__(self, source: Source | None, transform: Any, kind: Labels, channels: int):
        self.source, self.transform, self.kind, self.channels = source, transform, kind, channels

    def __len__(self) -> int:
        return 0  # a DataLoader asks; an order knows

    def __getitems__(self, draw: Draw) -> dict[str, Any]:
        """What `pictures` makes, what the kind of labels adds, ids int64 [B]; `faults` [(slot, reason)] of bad
        samples."""
        try:
            return self.batch(draw)
        except Exception as error:
            if not hasattr(error, "__notes__"):
                error.add_note(f"one of the samples {', '.join(map(str, draw.ids[:8]))}{', ...' * (len(draw.ids) > 8)}")
            raise

    def batch(self, draw: Draw) -> dict[str, Any]:
        labels, faults = self.labels(draw), dict[int, str]()
        batch: dict[str, Any] = {
            **self.pictures(draw, labels, faults),
            **self.kind.collate(labels),
            "ids": torch.from_numpy(draw.ids),
        }
        if faults:
            batch["faults"] = list(faults.items())
        return batch if draw.counts else batch | {"valid": torch.zeros(len(draw.ids), dtype=torch.bool)}

    def pictures(self, draw: Draw, labels: np.ndarray, faults: dict[int, str]) -> dict[str, Any]:
        """images_BCHW uint8 and what else a batch holds of them; notes bad samples, and may change their labels."""
        raise NotImplementedError

    def labels(self, draw: Draw) -> np.ndarray:
        if draw.rows is not None:
            return draw.rows.labels
        assert self.source is not None, "what is not streamed has a source"
        return self.source.labels[draw.ids]

    def picture(self, draw: Draw, slot: int) -> bytes | torch.Tensor:
        if draw.rows is not None:
            return draw.rows.pictures[slot]
        assert self.source is not None
        return self.source.read(int(draw.ids[slot]))

    def each(self, draw: Draw, labels: np.ndarray, faults: dict[int, str], work: Callable[[int, int], object]) -> None:
        """Do the work on each slot and key; a bad sample comes among the faults."""
        for slot, key in enumerate(draw.keys.tolist()):
            try:
                if fault := self.kind.fault(labels[slot]):
                    raise DataError(fault)
                work(slot, key)
            except DataError as error:
                faults[slot] = error.what
            except Exception as error:
                error.add_note(f"sample {draw.ids[slot]}")
                raise

    def blank_out(self, labels: np.ndarray, faults: dict[int, str]) -> None:
        for slot in faults:
            labels[slot] = self.kind.blank  # of a sample that will be replaced or left out


class ImageDataset(PictureDataset):
    """Squares that are cut, then augmented together."""

    transform: Transform

    def pictures(self, draw: Draw, labels: np.ndarray, faults: dict[int, str]) -> dict[str, Any]:
        images_BCHW = self.squares_at_once(draw, faults)
        if images_BCHW is None:
            images_BCHW = self.squares(draw, labels, faults)
        self.blank_out(labels, faults)
        return {"images_BCHW": self.transform.augment(images_BCHW, labels, draw.keys)}

    def squares_at_once(self, draw: Draw, faults: dict[int, str]) -> torch.Tensor | None:
        """uint8 [B, C, S, S] of images in memory that are all cut alike; None for any other."""
        if not isinstance(self.source, TensorSource):
            return None
        bad = self.source.bad
        faults |= {slot: bad[place] for slot, place in enumerate(draw.ids.tolist()) if place in bad} if bad else {}
        return self.transform.cut_all(taken(self.source.images_NCHW, draw.ids))

    def squares(self, draw: Draw, labels: np.ndarray, faults: dict[int, str]) -> torch.Tensor:
        """uint8 [B, C, S, S], one after the other; a bad sample is black and among the faults."""
        size = self.transform.geometry.size
        images_BCHW = black((len(draw.ids), self.channels, size, size))

        def cut(slot: int, key: int) -> None:
            self.transform.cut(self.picture(draw, slot), key, self.channels, images_BCHW[slot])

        self.each(draw, labels, faults, cut)
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
