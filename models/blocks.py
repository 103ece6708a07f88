"""Which modules of a model are its blocks: what is computed twice or sharded as a whole."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
AS_THEY_LIE = (nn.Sequential.forward, nn.ModuleList.forward)  # other containers may do more with what they hold


def blocks(module: nn.Module, *, contained: bool = False) -> Iterator[nn.Module]:
    """The outermost modules in containers that have layers of their own: a ResNet's bottlenecks, a ViT's encoders."""
    children = list(module.children())
    container = isinstance(module, CONTAINERS) and type(module).forward in AS_THEY_LIE
    if contained and children and not (container and all(list(child.children()) for child in children)):
        yield module
        return
    for child in children:
        yield from blocks(child, contained=container)
