"""Several tasks on one backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.base_model import BaseModel, ModelError

LOG_VARIANCES = "log_variances"


class MultiHead(BaseModel):
    """Any classifier without its head, and a linear head for each task.

    heads: outputs of each task by its name. learnt_weights: a log variance for each task goes with the outputs, which
    weighs its loss (Kendall et al. 2018, https://arxiv.org/abs/1705.07115). backbone_args: more arguments of the
    classifier.
    """

    def __init__(
        self,
        architecture: str,
        heads: dict[str, int],
        in_channels: int = 3,
        image_size: int = 32,
        dropout: float | None = None,
        learnt_weights: bool = False,
        **backbone_args: Any,
    ):
        super().__init__()
        from models.model import build  # which builds this

        if LOG_VARIANCES in heads:
            raise ModelError(f"no task can have the name {LOG_VARIANCES!r}")
        self.backbone = build(
            architecture,
            num_classes=1, in_channels=in_channels, image_size=image_size, dropout=dropout, **backbone_args,
        )  # fmt: skip
        self.features = self.backbone.remove_head()
        self.names = list(heads)
        self.heads = nn.ModuleList(nn.Linear(self.features, outputs) for outputs in heads.values())
        self.log_variances = nn.Parameter(torch.zeros(len(heads))) if learnt_weights else None

    @property
    def dim(self) -> int:
        return self.features

    def head_layers(self) -> list[nn.Module]:
        return list(self.heads)

    def init_weights(self) -> None:
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Outputs [B, outputs] by the task's name; log_variances [tasks] where weights are learnt."""
        features_BD = self.backbone(self.normalize(images_BCHW))
        outputs = {name: head(features_BD) for name, head in zip(self.names, self.heads)}
        if self.log_variances is not None:
            outputs[LOG_VARIANCES] = self.log_variances * 1  # an output: DDP and FSDP look after what forward uses
        return outputs
