"""Optimizers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.errors import ConfigError
from configs.options import Config

LR_BATCH_SIZE = 256  # what --lr is for with --lr_scale, as in Goyal et al. 2017


def peak_lr(config: Config, batch_size: int) -> float:
    """The peak learning rate of a global batch size."""
    return scaled(config.lr, config, batch_size)


def swa_lr(config: Config, batch_size: int, epoch: int) -> float | None:
    """The constant learning rate of SWA's epochs; None in any other."""
    if config.swa_lr is None or config.swa_start_epoch is None or epoch < config.swa_start_epoch:
        return None
    return scaled(config.swa_lr, config, batch_size)


def scaled(lr: float, config: Config, batch_size: int) -> float:
    power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[config.lr_scale]
    return lr * (batch_size / LR_BATCH_SIZE) ** power


def build_optimizers(model: nn.Module, config: Config, *, sharded: bool = False) -> list[torch.optim.Optimizer]:
    """One optimizer; for muon two: it takes the matrices, AdamW the rest. No decay for biases and norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError(f"--model {config.model} has no parameter to train")
    fused: Any = {"fused": True} if parameters[0].device.type in ("cpu", "cuda", "mps") else {}
    decay, lr = config.weight_decay, peak_lr(config, config.batch_size)
    levels = rate_levels(model, config)
    if config.optimizer == "sgd":
        nesterov, fused = config.momentum > 0, {} if sharded else fused  # torch has no fused one for parts
        sgd = torch.optim.SGD(groups(parameters, config, levels), lr, config.momentum, nesterov=nesterov, **fused)
        if fused and config.momentum:  # torch leaves them as the memory was where the first update is not finite
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [sgd]
    if config.optimizer == "adam":
        return [torch.optim.Adam(groups(parameters, config, levels), lr, **fused)]
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(groups(parameters, config, levels), lr, **fused)]
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"torch {torch.__version__} has no Muon", fix="upgrade torch, or take --optimizer adamw")
    if sharded:  # torch's computes in bfloat16 with what a process has: 1e-3 apart after 20 steps
        raise ConfigError("--optimizer muon does not go with FSDP: it needs whole matrices", fix="take adamw, or DDP")
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    if not matrices:
        raise ConfigError(f"--optimizer muon needs weight matrices, and {config.model} has none")
    muon = torch.optim.Muon(
        groups(matrices, config, levels), lr, decay, config.momentum, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )  # the same lr as for AdamW then fits (Liu et al. 2025, "Muon is scalable")
    return [muon, torch.optim.AdamW(groups(others, config, levels), lr, **fused)] if others else [muon]


@contextmanager
def same_kernels(optimizers: list[torch.optim.Optimizer]) -> Iterator[None]:
    """Inside, optimizers take up a saved state, but go on to compute as they did: a fused SGD is none with FSDP."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    kept: list[dict[str, Any]] = [
        {name: group[name] for name in ("fused", "foreach") if name in group} for group in groups
    ]
    yield
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, kernels in zip(groups, kept, strict=True):
        group.update(kernels)


def rate_levels(model: Any, config: Config) -> dict[nn.Parameter, int]:
    """How often --layer_decay multiplies the learning rate of each parameter: once for every block that it lies below
    the head (Clark et al. 2020, "ELECTRA", appendix A; Bao et al. 2021, "BEiT"). Empty: all are alike."""
    if config.layer_decay != 1:
        return model.depths()
    if config.freeze_epochs:  # the head has a past when the body begins; torch's fused SGD takes no group of both
        return {parameter: min(depth, 1) for parameter, depth in model.depths().items()}
    return {}


def groups(parameters: list[nn.Parameter], config: Config, levels: dict[nn.Parameter, int]) -> list[dict[str, Any]]:
    """Vectors and scalars (biases, norms) get no weight decay; what learns at one rate stands together."""
    found: list[dict[str, Any]] = []
    for level in sorted({levels.get(p, 0) for p in parameters}):
        alike = [p for p in parameters if levels.get(p, 0) == level]
        rate = {"lr_factor": config.layer_decay**level} if levels else {}
        found += [
            {"params": [p for p in alike if p.ndim > 1], "weight_decay": config.weight_decay, **rate},
            {"params": [p for p in alike if p.ndim <= 1], "weight_decay": 0.0, **rate},
        ]
    return [group for group in found if group["params"]]


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most max_norm (None: measure alone); the norm before, left
    on the device.

    torch.nn.utils.clip_grad_norm_ computes the same, tensor by tensor on a CPU: 45 us for four of them, here 25.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    if isinstance(gradients[0], DTensor):
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def lr_factor(step: int, config: Config, *, total_steps: int, epoch: float) -> float:
    """What the peak learning rate is multiplied by in the update that follows `step` updates and `epoch` epochs.

    cosine and one_cycle are those of torch (one_cycle: 30 % up from 1/25, then down to 4e-6, all cosine);
    step and exponential fall by --decay_factor every --decay_epochs epochs, or smoothly every epoch.
    """
    warmup = config.warmup_steps
    if config.scheduler == "one_cycle":
        up = (warmup or 0.3 * total_steps) - 1
        if step <= up:
            return cosine_between(1 / 25, 1.0, step / up if up else 1.0)
        return cosine_between(1.0, 1 / 25e4, (step - up) / max(1e-9, total_steps - 1 - up))
    if step < warmup:
        return (step + 1) / warmup
    if config.scheduler == "cosine":
        return cosine_between(1.0, 0.0, (step - warmup) / max(1, total_steps - warmup))
    if config.scheduler == "step":
        return config.decay_factor ** (int(epoch) // config.decay_epochs)
    if config.scheduler == "exponential":
        return config.decay_factor**epoch
    return 1.0


def cosine_between(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2
