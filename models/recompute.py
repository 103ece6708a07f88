"""Gradient checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost"): a block keeps its input
alone and computes the rest again in the backward pass. The result is the same to the last bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from models.base_model import ModelError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
AS_THEY_LIE = (nn.Sequential.forward, nn.ModuleList.forward)  # other containers may do more with what they hold


def recompute_blocks(model: nn.Module) -> None:
    """Let every block of a model compute twice and keep little. Raises ModelError where there is none."""
    found = list(blocks(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no blocks that --gradient_checkpointing could compute twice: modules with "
            "layers of their own in an nn.Sequential or nn.ModuleList"
        )
    for block in found:
        norms = [module for module in block.modules() if isinstance(module, _NormBase)]
        block.forward = functools.partial(keeping_little, block.forward, norms)  # unlike a function, copied with it


def blocks(module: nn.Module, *, contained: bool = False) -> Iterator[nn.Module]:
    """The outermost modules in containers that have layers of their own: a ResNet's bottlenecks, a ViT's encoders."""
    children = list(module.children())
    container = isinstance(module, CONTAINERS) and type(module).forward in AS_THEY_LIE
    if contained and children and not (container and all(list(child.children()) for child in children)):
        yield module
        return
    for child in children:
        yield from blocks(child, contained=container)


def recomputed(model: nn.Module) -> list[nn.Module]:
    """The blocks that do so."""
    wrapped = [(module, vars(module).get("forward")) for module in model.modules()]
    return [module for module, forward in wrapped if getattr(forward, "func", None) is keeping_little]


def computing_once(model: nn.Module) -> nn.Module:
    """A copy that keeps everything."""
    plain = copy.deepcopy(model)
    for block in recomputed(plain):
        del block.forward
    return plain


def keeping_little(forward: Callable[..., Any], norms: list[_NormBase], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    contexts = functools.partial(first_and_second, norms)
    return checkpoint(forward, *given, use_reentrant=False, context_fn=contexts, **named)


def first_and_second(norms: list[_NormBase]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), statistics_stand_still(norms)


@contextmanager
def statistics_stand_still(norms: list[_NormBase]) -> Iterator[None]:
    """BatchNorm would move its running statistics in the second computation, too."""
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, batches
