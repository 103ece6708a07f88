"""scripts/train.py with a small BatchNorm network of its own: python tests/bn_net.py --model bn_net ...

With FSDP_ON_CPU=1 in the environment FSDP works without a GPU, where Accelerate would silently make DDP of it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate.state import DistributedType, PartialState
from torch import Tensor, nn

from models import MODELS, BaseModel


class Block(nn.Sequential):
    pass


class BatchNormNet(BaseModel):
    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, dropout: float = 0.1):
        super().__init__()
        self.body = nn.Sequential(
            Block(nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            Block(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(32, num_classes)

    @property
    def dim(self) -> int:
        return self.head.in_features

    def init_weights(self) -> None:
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.body(self.normalize(images_BCHW)))


MODELS["bn_net"] = BatchNormNet


def let_fsdp_be_on_cpu() -> None:
    """Accelerate asks whether the processes have GPUs; torch itself shards on a CPU as well."""
    PartialState(cpu=True)
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


if __name__ == "__main__":
    if os.environ.get("FSDP_ON_CPU"):
        let_fsdp_be_on_cpu()
    from scripts.train import main

    sys.exit(main(sys.argv[1:]))
