"""The contrastive loss over the samples of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


class GatheredRows(torch.autograd.Function):
    """Rows [B, D] of all processes, [W * B, D]; the gradient of each comes from the losses of all of them.

    Every process has as many rows. DDP takes the mean over processes of the gradients, and each process's loss is a
    mean over its own rows: together that is the gradient of the mean over all rows.
    """

    @staticmethod
    def forward(context: Any, rows_BD: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient_ND = gradients[0].contiguous()
        dist.all_reduce(gradient_ND)
        return gradient_ND.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, one process after the other; gradients come back to those of this one."""
    return GatheredRows.apply(rows) if dist.is_initialized() and dist.get_world_size() > 1 else rows


def contrastive_loss(embeddings: tuple[Tensor, Tensor, Tensor], names_B: Tensor) -> Tensor:
    """Cross entropy of each image among all texts and of each text among all images (Radford et al. 2021, figure 3),
    the mean over the rows of this process, both ways.

    embeddings: images and texts [B, D] of unit length, those of one row belonging together, and the scale of their
    products. Pairs of equal names, int64, belong together as well, and share the target evenly.
    """
    images_BD, texts_BD, scale = embeddings
    everything_N = gathered(torch.cat([images_BD, texts_BD], 1))
    images_ND, texts_ND = everything_N.chunk(2, 1)
    same_BN = (names_B[:, None] == gathered(names_B)[None]).to(images_BD.dtype)
    targets_BN = same_BN / same_BN.sum(1, keepdim=True)
    to_texts = functional.cross_entropy(scale * images_BD @ texts_ND.T, targets_BN)
    to_images = functional.cross_entropy(scale * texts_BD @ images_ND.T, targets_BN)
    return (to_texts + to_images) / 2
