"""What DDP has to be told and brought to, so that a run on several processes is the run of one."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from configs.errors import ConfigError
from configs.options import Config

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer


def ddp_options(config: Config, model: nn.Module) -> DistributedDataParallelKwargs:
    """DDP need not send the buffers around at every forward where only BatchNorm's change, which are kept equal."""
    saved = model.state_dict().keys()
    constant = {id(buffer) for name, buffer in model.named_buffers() if name not in saved}
    of_norms = {id(b) for module in model.modules() if isinstance(module, _NormBase) for b in module.buffers()}
    others = any(id(buffer) not in constant | of_norms for buffer in model.buffers())
    # torch 2.14 has a new name for it, which Accelerate 1.15 does not pass on
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return DistributedDataParallelKwargs(broadcast_buffers=others, find_unused_parameters=config.find_unused_parameters)


def with_synced_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """BatchNorm's statistics of what all processes compute at once."""
    if device.type != "cuda":
        raise ConfigError(f"--sync_batch_norm needs GPUs, and the device is {device.type}", fix="leave it out")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class SumOfWeights(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module  # DDP looks for its buffers

    def forward(self, nothing: None) -> Tensor:
        return torch.stack([weight.sum() for weight in self.module.parameters() if weight.requires_grad]).sum()


def settle_buckets(model: Any) -> None:
    """A backward through no data, before the first step.

    DDP orders its buckets anew after its first backward. With three processes or more that changes the order in which
    gradients are added up: a resumed run's first step would have other last bits than the step that it repeats.
    With find_unused_parameters it keeps the order, and would warn that every parameter took part.
    """
    if not isinstance(model, DistributedDataParallel) or model.find_unused_parameters:
        return
    module = model.module
    model.module = SumOfWeights(module)
    try:
        model(None).backward()  # on a GPU DDP wants an argument to send there
    finally:
        model.module = module
    model.zero_grad()


def wrapped_anew(trainer: BaseTrainer, old: DistributedDataParallel) -> DistributedDataParallel:
    """DDP waits for the gradients of those parameters that learnt when it was made, so it is made again."""
    old._remove_autograd_hooks()  # or both would answer to a gradient for as long as the old one is in memory
    options = trainer.accelerator.ddp_handler.to_kwargs()
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about these; it was given once
        model = DistributedDataParallel(old.module, old.device_ids, old.output_device, **options)
    settle_buckets(model)
    return model
