"""A small convolutional network that keeps where in the image things are."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from models.base_model import BaseModel


class GridCNN(BaseModel):
    """Convolutions with GroupNorm, the strongest answers in each cell of a grid, linear head over all cells: a global
    average would lose what is above and what is below. grid: cells a side."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        dropout: float = 0.0,
        width: int = 32,
        grid: int = 3,
    ):
        super().__init__()
        small = image_size < 4 * grid
        self.body = nn.Sequential(
            *convolution(in_channels, width, size=5, stride=1 if small else 2),
            *convolution(width, 2 * width),
            nn.Identity() if small else nn.MaxPool2d(2),
            *convolution(2 * width, 4 * width),
            GridPool(grid),
            nn.Flatten(),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width * grid**2, num_classes)

    @property
    def dim(self) -> int:
        return self.head.in_features

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.head(self.dropout(self.body(self.normalize(images_BCHW))))


class GridPool(nn.Module):
    """The largest value in each cell of a grid of side x side."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[2:]
        if height % self.side or width % self.side:
            return functional.adaptive_max_pool2d(images_BCHW, self.side)  # on CUDA --deterministic refuses it
        return functional.max_pool2d(images_BCHW, (height // self.side, width // self.side))


def convolution(width_in: int, width: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, size, stride=stride, padding=size // 2, bias=False),
        nn.GroupNorm(8, width),
        nn.ReLU(inplace=True),
    ]
