"""A small convolutional network that learns in seconds on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from models.base_model import BaseModel


class SimpleCNN(BaseModel):
    """Three stages of two 3x3 convolutions, GroupNorm (Wu & He 2018: no batch statistics, so that any
    micro-batch size and number of processes computes the same), global average, linear head. width: channels of the
    first stage."""

    def __init__(
        self, num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.1, width: int = 32
    ):
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        stages: list[nn.Module] = []
        for width_in, width_out in zip((in_channels, *widths), widths):
            stages += [*conv_block(width_in, width_out), *conv_block(width_out, width_out)]
            if image_size >= 4:
                stages.append(nn.MaxPool2d(2))
                image_size //= 2
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    @property
    def dim(self) -> int:
        return self.head.in_features

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        features_BCHW = self.stages(self.normalize(images_BCHW))
        return self.head(self.dropout(self.pool(features_BCHW).flatten(1)))


def conv_block(width_in: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, 3, padding=1, bias=False),
        nn.GroupNorm(8, width),
        nn.ReLU(inplace=True),
    ]
