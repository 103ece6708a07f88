"""Recall: how often what belongs to a text is among the images nearest to it, and the other way."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from configs.errors import DataError
from trainer.processes import Processes
from trainer.windows import Batch

DEPTHS = (1, 5, 10)
NAMES = [f"{way}recall_at_{depth}" for way in ("", "image_to_text_") for depth in DEPTHS]
CHUNK = 1024  # queries whose similarities are at hand at a time


def names_of(tokens_TL: Tensor) -> Tensor:
    """A number for each text that is another for any other that the model can tell from it, int64 [T]."""
    digests = (blake2b(row.tobytes(), digest_size=8).digest() for row in tokens_TL.numpy())
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


class RetrievalMetrics:
    """Recall at 1, 5 and 10 over all images of a split, each with one caption or several.

    text to image: every caption of every image asks; a hit is any image that has this caption.
    image to text: every image asks among the different captions; a hit is any of its own.
    """

    def __init__(self, device: torch.device):
        self.images = Rows(device)
        self.texts = Rows(device)

    def update(self, predictions: Any, batch: Batch) -> None:
        """predictions: embeddings of the images [B, D], and of all their captions, in order [T, D]."""
        images_BD, texts_TD, _ = predictions
        self.images.add(images_BD, batch["ids"], torch.zeros_like(batch["ids"]))
        self.texts.add(texts_TD, batch["image_ids_T"], batch["names_T"])

    def compute(self, processes: Processes | None = None) -> dict[str, float]:
        images_ND, ids_N, _ = self.images.gathered(processes)
        texts_TD, of_image_T, names_T = self.texts.gathered(processes)
        names_U, number_T = names_T.unique(return_inverse=True)
        first_U = torch.full_like(names_U, len(names_T)).scatter_reduce(
            0, number_T, torch.arange(len(names_T), device=names_T.device), "amin"
        )
        texts_UD, image_T = texts_TD[first_U], torch.searchsorted(ids_N, of_image_T)
        asked_U = number_T.bincount(minlength=len(names_U))  # how many images have it
        found = recall(texts_UD, images_ND, number_T, image_T, asked_U)
        back = recall(images_ND, texts_UD, image_T, number_T, torch.ones_like(ids_N))
        return dict(zip(NAMES, [*found, *back]))


class Rows:
    """Embeddings, the image that each is of, and the name of a text."""

    def __init__(self, device: torch.device):
        self.device = device
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, embeddings_ND: Tensor, image_ids_N: Tensor, names_N: Tensor) -> None:
        self.parts.append((embeddings_ND.float(), image_ids_N, names_N))

    def gathered(self, processes: Processes | None) -> list[Tensor]:
        """Of all processes, by image, so that their number does not change the order."""
        columns = [torch.cat(column) for column in zip(*self.parts)]
        if processes is not None and processes.number > 1:
            columns = gathered(columns, self.device, processes)
        if not columns or not len(columns[0]):
            raise DataError("no image could be evaluated")
        order_N = columns[1].argsort(stable=True)
        return [column[order_N] for column in columns]


def gathered(columns: list[Tensor], device: torch.device, processes: Processes) -> list[Tensor]:
    """Also where a process has none, and so does not know how wide its rows are."""
    shape = columns[0].shape[1] if columns else 0
    width = int(processes.gather_rows(torch.tensor([shape], device=device)).max())
    if not columns:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        columns = [torch.zeros(0, width, device=device), none, none]
    return [processes.gather_rows(column) for column in columns]


def recall(queries_QD: Tensor, items_ID: Tensor, query_P: Tensor, item_P: Tensor, weight_Q: Tensor) -> list[float]:
    """The share of queries, each weighing weight_Q, with one of their own among the 1, 5 and 10 nearest items.

    query_P, item_P: the pairs that belong together. An item as near as the nearest of a query's own counts as nearer,
    so that what cannot be told apart is no hit.
    """
    order_P = query_P.argsort(stable=True)
    query_P, item_P = query_P[order_P], item_P[order_P]
    hits = torch.zeros(len(DEPTHS), dtype=torch.int64, device=queries_QD.device)
    for start in range(0, len(queries_QD), CHUNK):
        near_CI = queries_QD[start : start + CHUNK] @ items_ID.T
        first, last = torch.searchsorted(query_P, torch.tensor([start, start + CHUNK], device=query_P.device)).tolist()
        own_CI = torch.zeros_like(near_CI, dtype=torch.bool)
        own_CI[query_P[first:last] - start, item_P[first:last]] = True
        best_C1 = near_CI.masked_fill(~own_CI, -torch.inf).amax(1, keepdim=True)
        nearer_C = (~(near_CI < best_C1) & ~own_CI).sum(1)  # NaN is near to nothing
        for place, depth in enumerate(DEPTHS):
            hits[place] += weight_Q[start : start + CHUNK][nearer_C < depth].sum()
    return (hits / weight_Q.sum()).tolist()
