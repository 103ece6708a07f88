"""Which modules of a model are its blocks: what is computed twice or sharded as a whole, and learns at one rate."""

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


def depths(model: nn.Module, head: list[nn.Module]) -> dict[nn.Parameter, int]:
    """How far each parameter lies below the head: the head 0, the last block 1, the one before it 2, and what stands
    before the first block one more than that. What stands behind a block, as a last norm, belongs to it."""
    found = list(blocks(model))
    places = {parameter: place for place, block in enumerate(found, 1) for parameter in block.parameters()}
    of_head = {parameter for layer in head for parameter in layer.parameters()}
    place, below = 0, {}
    for parameter in model.parameters():
        place = places.get(parameter, place)
        below[parameter] = 0 if parameter in of_head else len(found) + 1 - place
    return below
