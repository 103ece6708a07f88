"""Knowledge distillation (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import ConfigError
from trainer.base_trainer import BaseTrainer
from trainer.losses import Losses, combine
from trainer.windows import Batch


def distillation_loss(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of the student's probabilities from the teacher's, both at the temperature; times
    its square, or a higher one would mean a smaller gradient (section 2 of the paper)."""
    log_q_BC = functional.log_softmax(logits_BC / temperature, 1)
    log_p_BC = functional.log_softmax(teacher_BC.to(logits_BC.dtype) / temperature, 1)
    return functional.kl_div(log_q_BC, log_p_BC, reduction="batchmean", log_target=True) * temperature**2


def distilled(task: type[BaseTrainer], teacher: Any) -> type[BaseTrainer]:
    """A classification trainer that learns from the logits of `teacher`, too, a models.BaseModel of the same classes.

    The teacher sees the images that the student trains on, augmented and mixed. Evaluations stay the task's own: their
    loss is the cross entropy alone.
    """
    identity = fingerprint(teacher)

    class Distilled(task):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            if self.resume_from and self.state.teacher != identity:
                raise ConfigError(
                    f"the run was begun with another teacher: the sha256 of its weights was {self.state.teacher}, "
                    f"now it is {identity}",
                    where=str(self.config.teacher),
                    fix="put that teacher back, or begin a run of another --experiment_name",
                )
            self.state.teacher = identity
            self.teacher = teacher.to(self.device).requires_grad_(False).eval()
            if self.config.dtype == "float64":
                self.teacher.double()
            if self.config.channels_last:
                self.teacher.to(memory_format=torch.channels_last)
            if self.config.compile:
                self.teacher.compile()

        def forward_pass(self, batch: Batch) -> tuple[Losses, Any]:
            if not self.model.training:
                return super().forward_pass(batch)
            images_BCHW, targets = self.mixed(batch)
            with torch.no_grad(), self.accelerator.autocast():  # before the student keeps its activations
                teacher_BC = self.teacher(resized(images_BCHW, self.teacher.image_size))
            logits_BC = self.model(images_BCHW)
            weight, temperature = self.config.distill_weight, self.config.distill_temperature
            losses = combine(
                {
                    "cross_entropy": self.criterion,
                    "distillation": lambda logits, taught: distillation_loss(logits, taught, temperature),
                },
                logits_BC,
                {"cross_entropy": targets, "distillation": teacher_BC},
                {"cross_entropy": 1 - weight, "distillation": weight},
            )
            return losses, logits_BC

    return Distilled


def resized(images_BCHW: Tensor, size: int | None) -> Tensor:
    """Squares of this side, floats in 0..1 where they had another."""
    if size in (None, images_BCHW.shape[-1]):
        return images_BCHW
    if images_BCHW.dtype == torch.uint8:
        images_BCHW = images_BCHW.float() / 255
    return functional.interpolate(images_BCHW, (size, size), mode="bilinear", antialias=True)


def fingerprint(model: nn.Module) -> str:
    """sha256 of all weights and buffers, the mean and deviation of its pixels among them."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
