"""Test-time augmentation: a classifier that looks at several views of each image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SHIFTS = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))  # pixels down and to the right


class MeanOfViews(nn.Module):
    """Its outputs [B, classes] are logarithms of the mean of the probabilities that the classifier gives each view.

    mirror: the views are the image and its mirror image; else the image, and it moved by one pixel to each side.
    """

    def __init__(self, classifier: nn.Module, *, mirror: bool):
        super().__init__()
        self.classifier, self.mirror = classifier, mirror

    def forward(self, images_BCHW: Tensor) -> Tensor:
        views = [images_BCHW, images_BCHW.flip(3)] if self.mirror else [moved(images_BCHW, *by) for by in SHIFTS]
        log_p_VBC = torch.stack([self.classifier(view).log_softmax(1) for view in views])
        return log_p_VBC.logsumexp(0) - math.log(len(views))


def moved(images_BCHW: Tensor, down: int, right: int) -> Tensor:
    """Shifted by whole pixels; the pixels of the edge fill what comes in."""
    rows, columns = (torch.arange(length, device=images_BCHW.device) for length in images_BCHW.shape[2:])
    images_BCHW = images_BCHW.index_select(2, (rows - down).clamp(0, len(rows) - 1))
    return images_BCHW.index_select(3, (columns - right).clamp(0, len(columns) - 1))
