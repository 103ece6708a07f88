"""What a model costs: parameters, bytes, FLOPs, activation memory; computed on no data, without memory."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from models.base_model import BaseModel
from models.recompute import computing_once, recomputed


class Cost(NamedTuple):
    flops: float  # of one image's forward pass, two a multiply-add
    activation_bytes: int  # that a training step keeps for its backward pass
    convolution_flops: float  # that part of flops


def summarize(model: BaseModel, channels: int, image_size: int, batch_size: int, found: Cost | None = None) -> str:
    """One line. found: what `cost` gave for the same, where it is known already."""
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    flops, activation_bytes, _ = found or cost(model, channels, image_size, batch_size)
    keeps = f"{megabytes(activation_bytes)} activations at {batch_size} images"
    if blocks := recomputed(model):
        all_of_them = cost(computing_once(without_data(model)), channels, image_size, batch_size).activation_bytes
        keeps += f" instead of {megabytes(all_of_them)}, {len(blocks)} blocks being computed twice"
    return (
        f"{parameters:,} parameters"
        + (f" ({trainable:,} trainable)" if trainable != parameters else "")
        + f", {megabytes(size)}; {flops / 1e6:,.1f} MFLOPs an image; "
        f"{keeps}" + (f"; without {model.not_measured}" if model.not_measured else "")
    )


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def cost(model: BaseModel, channels: int, image_size: int, batch_size: int) -> Cost:
    """What a training step of batch_size costs, from a copy on the meta device."""
    ghost = without_data(model).train()
    for block in recomputed(ghost):  # what it keeps is seen by nobody else
        block.register_forward_pre_hook(lambda _, inputs: tree_map_only(Tensor, note, inputs) and None)
    inputs = ghost.example_inputs(batch_size, channels, image_size)
    own = {storage_of(tensor) for tensor in [*ghost.parameters(), *ghost.buffers()]}
    kept: dict[int, Tensor] = {}  # holds on to the tensors: an address is no other's while one lives

    def note(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in own:
            kept[storage_of(tensor)] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ghost(*inputs)
    convolution = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    keeps = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Cost(counter.get_total_flops() / batch_size, keeps, convolution / batch_size)


def without_data(model: BaseModel) -> BaseModel:
    """A copy on the meta device, for which no weight is copied."""
    tensors: dict[int, Tensor] = {id(t): t.detach().to("meta") for t in model.buffers()}
    for weight in model.parameters():
        tensors[id(weight)] = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
    return copy.deepcopy(model, tensors).to("meta")  # what is there already is taken


def storage_of(tensor: Tensor) -> int:
    """Tells which tensors share their memory: on the meta device there are no data pointers to compare."""
    return tensor.untyped_storage()._cdata
