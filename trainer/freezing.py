"""--freeze_epochs: at first the head learns alone, later the whole model. What rests has no gradient, so that neither
weight decay nor momentum moves it, and the optimizer keeps no state of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.parallel import DistributedDataParallel

from configs.errors import ConfigError
from trainer.batch_statistics import BatchStatistics
from trainer.ddp import wrapped_anew

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer


def freeze(trainer: BaseTrainer) -> None:
    """Before the model is wrapped: DDP learns then which gradients to expect."""
    if trainer.state.epoch >= trainer.config.freeze_epochs:
        return
    if trainer.sharded:
        raise ConfigError("--freeze_epochs does not go with FSDP", fix="take accelerate_configs/ddp.yaml, or 0 epochs")
    trainer.plain_model.freeze_body()
    if not any(parameter.requires_grad for parameter in trainer.plain_model.parameters()):
        raise ConfigError(f"--freeze_epochs: {trainer.config.model} has no head to train alone", fix="leave it out")


def thaw_when_due(trainer: BaseTrainer) -> None:
    """At the beginning of an epoch: from `--freeze_epochs` on all of the model learns."""
    if trainer.plain_model.frozen and trainer.state.epoch >= trainer.config.freeze_epochs:
        thaw(trainer)


def thaw(trainer: BaseTrainer) -> None:
    """Let all of the model learn. What the trainer has of its parts is as it would be without the time before."""
    model = trainer.plain_model
    model.thaw_body()
    trainer.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer.batch_statistics = BatchStatistics(model, trainer.reduce)
    if isinstance(trainer.model, DistributedDataParallel):
        trainer.model = wrapped_anew(trainer, trainer.model)
