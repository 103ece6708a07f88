"""FSDP2: each process keeps a part of every weight. What is saved is whole, in the files that an unsharded run writes:
any number of processes goes on from it, sharded or not."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.environment import is_on
from configs.errors import ConfigError
from configs.options import Config
from trainer.launch import PLAIN

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer


def asked_for() -> FullyShardedDataParallelPlugin | None:
    """What the launcher's file says of FSDP; the weights stay in float32, as without it."""
    if not is_on("ACCELERATE_USE_FSDP"):
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ConfigError(
            f"the launcher asks for FSDP {version}, whose checkpoints do not continue exactly",
            fix="take accelerate_configs/fsdp2.yaml, or fsdp_version: 2 in a file of your own",
        )
    # each process has built the same weights already: there are none to be sent around, as that loading does
    plugin = FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(), cpu_ram_efficient_loading=False
    )
    names = plugin.transformer_cls_names_to_wrap or []  # `accelerate config` writes an empty one where none is given
    plugin.transformer_cls_names_to_wrap = [name.strip() for name in names if name.strip()] or None
    return plugin


def check_it_is_there(accelerator: Accelerator) -> None:
    """Accelerate makes DDP or one process of FSDP where it cannot have it, and says nothing."""
    if not accelerator.is_fsdp2:
        raise ConfigError(
            f"the launcher asks for FSDP, and what there is would be {accelerator.num_processes} process(es) without",
            fix=f"FSDP needs two GPUs or more; without it: {PLAIN}",
        )


def check_options(config: Config, precision: str) -> None:
    if precision == "fp16":
        raise ConfigError("--mixed_precision fp16 does not go with FSDP", fix="take --mixed_precision bf16 or no")
    if config.channels_last:
        raise ConfigError("--channels_last does not go with FSDP, which cuts weights along their rows", fix=PLAIN)


def check_blocks(model: nn.Module, accelerator: Accelerator) -> None:
    """Of the classes that the launcher's file names the model must have instances."""
    asked = accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or []
    known = {type(module).__name__ for module in model.modules()}
    if missing := [name for name in asked if name not in known]:
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap names {missing[0]}, and the model has no such layer",
            fix="leave it out: the model knows its blocks",
        )


def compute_in_precision(model: nn.Module, accelerator: Accelerator) -> None:
    """Autocast in the forward and outputs in float32, which Accelerate gives to all models but sharded ones.

    Without autocast's cache, which would hold on to the weights that were gathered, cast to bf16.
    """
    uncached = AutocastKwargs(cache_enabled=False)
    forward: Callable[..., Any] = model.forward

    @functools.wraps(forward)
    def in_precision(*given: Any, **named: Any) -> Any:
        with accelerator.autocast(uncached):
            return forward(*given, **named)

    model.forward = convert_outputs_to_fp32(in_precision)


def let_blocks_be_compiled() -> None:
    """FSDP's hooks cut the graph at each block, and blocks of one class count together against dynamo's limit."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)


def part(tensor: Tensor) -> Tensor:
    """What this process keeps of it, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distributed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, distributed as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Any, like: Tensor | None = None) -> Any:
    """All of a tensor, in CPU memory where it was distributed: each process calls it. like: how a part of one is."""
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        tensor = DTensor.from_local(tensor, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def whole_weights(trainer: BaseTrainer) -> dict[str, Tensor]:
    """The model's state dict, on the main process; every process calls it. A weight of two names is there once."""
    own = {id(tensor): (name, tensor) for name, tensor in trainer.plain_model.state_dict(keep_vars=True).items()}
    tensors = ((name, whole(tensor.detach())) for name, tensor in own.values())
    return {name: tensor.contiguous() for name, tensor in tensors if trainer.is_main}


def save(trainer: BaseTrainer, folder: Path) -> None:
    """model.safetensors and optimizer.bin, as Accelerate's save_state writes them for models that are not sharded."""
    weights = whole_weights(trainer)
    states = [whole_state(optimizer.state_dict(), keep=trainer.is_main) for optimizer in trainer.optimizers]
    if not trainer.is_main:
        return
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for number, state in enumerate(states):
        torch.save(state, folder / optimizer_file(number))


def optimizer_file(number: int) -> str:
    return f"optimizer_{number}.bin" if number else "optimizer.bin"


def whole_state(state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """An optimizer's state dict, on the processes that keep it; every process calls it."""
    of_parameters: dict[int, dict[str, Any]] = {}
    for place, values in state["state"].items():
        tensors = {name: whole(value) for name, value in values.items()}
        if keep:
            of_parameters[place] = tensors
    return {**state, "state": of_parameters}


@torch.no_grad()
def load(trainer: BaseTrainer, folder: Path) -> None:
    """What `save`, or a run that is not sharded, has saved. Raises KeyError, ValueError or RuntimeError."""
    weights = load_file(folder / "model.safetensors")
    own = trainer.plain_model.state_dict(keep_vars=True)
    found = {id(own[name]) for name in own.keys() & weights.keys()}  # a weight of two names is there once
    missing = [name for name, tensor in own.items() if id(tensor) not in found]
    if wrong := missing or [*(weights.keys() - own.keys())]:
        raise KeyError(f"{wrong[0]} is {'missing' if missing else 'none of its weights'}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{name} has the shape {[*tensor.shape]}, the model's is {[*own[name].shape]}")
        part(own[name].detach()).copy_(part(distributed(tensor, own[name])))
    for number, optimizer in enumerate(trainer.optimizers):
        state = torch.load(folder / optimizer_file(number), map_location="cpu", weights_only=True)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for place, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameters[place].shape:
                    values[name] = distributed(value, parameters[place])
        optimizer.load_state_dict(state)
