"""Gradient checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost"): a block keeps its input
alone and computes the rest again in the backward pass. The result is the same to the last bit, unless a module other
than BatchNorm changes a buffer in its forward: it would do so twice."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from models.base_model import ModelError
from models.blocks import blocks

M = TypeVar("M", bound=nn.Module)


def recompute_blocks(model: nn.Module, *, compiled: bool = False) -> None:
    """Let every block of a model compute twice and keep little. Raises ModelError where there is none, or where
    torch.compile would move BatchNorm's statistics twice."""
    found = list(blocks(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no blocks that --gradient_checkpointing could compute twice: modules with "
            "layers of their own in an nn.Sequential or nn.ModuleList: leave it out, or take another --model"
        )
    if compiled and any(map(norms_of, found)):
        raise ModelError(
            f"--compile and --gradient_checkpointing cannot be had together for {type(model).__name__}, whose blocks "
            "have BatchNorm: compiled, its running statistics would move twice a step"
        )
    for block in found:
        block.forward = functools.partial(keeping_little, block, block.forward)  # unlike a function, copied with it


def recomputed(model: nn.Module) -> list[nn.Module]:
    """The blocks that do so."""
    wrapped = [(module, vars(module).get("forward")) for module in model.modules()]
    return [module for module, forward in wrapped if getattr(forward, "func", None) is keeping_little]


def computing_once(model: M) -> M:
    """A copy that keeps everything."""
    plain = copy.deepcopy(model)
    for block in recomputed(plain):
        del block.forward
    return plain


def keeping_little(block: nn.Module, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    if not norms_of(block):  # torch.compile takes no contexts of ours
        return checkpoint(forward, *given, use_reentrant=False, **named)
    contexts = functools.partial(first_and_second, block)
    return checkpoint(forward, *given, use_reentrant=False, context_fn=contexts, **named)


def norms_of(block: nn.Module) -> list[_NormBase]:
    return [module for module in block.modules() if isinstance(module, _NormBase)]


def first_and_second(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), statistics_stand_still(block)


@contextmanager
def statistics_stand_still(block: nn.Module) -> Iterator[None]:
    """BatchNorm would move its running statistics in the second computation, too."""
    norms = norms_of(block)
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone() if norm.num_batches_tracked is not None else None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, batches
