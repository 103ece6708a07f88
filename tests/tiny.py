"""Small models and trainers that tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.arguments import make_config
from models import BaseModel
from trainer.main_trainer import MainTrainer


class TinyNet(BaseModel):
    """Convolution, activation, head: no BatchNorm and no dropout."""

    def __init__(self, num_classes: int = 3, in_channels: int = 1):
        super().__init__()
        self.body = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)
        self.classes = [str(number) for number in range(num_classes)]

    @property
    def dim(self) -> int:
        return 8

    def init_weights(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.body(self.normalize(images_BCHW)).relu().mean((2, 3)))


def tiny_batches(sizes: list[int], classes: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of images [B, 1, 6, 6] whose brightness tells their class."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        labels = torch.randint(0, classes, (size,), generator=generator)
        noise = torch.randn(size, 1, 6, 6, generator=generator)
        batches.append((noise * 0.3 + labels[:, None, None, None], labels))
    return batches


def tiny_trainer(
    folder: Path,
    train: Any,
    val: Any = None,
    *,
    trainer: type[MainTrainer] = MainTrainer,
    model: Any = None,
    **options: Any,
) -> MainTrainer:
    plain = {"weight_decay": 0.0, "scheduler": "constant", "cpu_threads": 1, "output_dir": str(folder), "epochs": 1}
    return trainer(make_config(**(plain | options)), model or TinyNet(), train, val)


def weights(trainer: MainTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.plain_model.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
