"""One loss or several: single, tuple, list or dict, with weights of the same form, every part by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError

Loss = Callable[[Any, Any], Tensor]
Criterion = Loss | Sequence[Loss] | Mapping[str, Loss]
Weights = float | Sequence[float] | Mapping[str, float] | None
Losses = Tensor | dict[str, Tensor]  # the total alone, or {"loss": total, "loss/<name>": part, ...}


def combine(criterion: Criterion, outputs: Any, targets: Any, weights: Weights = None) -> Losses:
    """Apply a criterion of any form. A tuple or list of k losses takes k outputs and k targets, or shares one;
    a dict takes them by its keys, or shares one.
    """
    if isinstance(criterion, Mapping):
        parts = {name: (loss, *pick(name, outputs, targets)) for name, loss in criterion.items()}
        factors = by_name(weights, list(criterion))
    elif isinstance(criterion, Sequence):
        names = part_names(criterion)
        outputs_k = spread(outputs, len(criterion), "outputs")
        targets_k = spread(targets, len(criterion), "targets")
        parts = dict(zip(names, zip(criterion, outputs_k, targets_k)))
        factors = by_place(weights, names)
    else:
        if weights is not None and not isinstance(weights, (int, float)):
            raise UserError(f"one loss takes one weight, not {weights}", where="loss_weights")
        loss = criterion(outputs, targets)
        return loss if weights is None else loss * weights
    values = {name: loss(output, target) for name, (loss, output, target) in parts.items()}
    weighted = torch.stack([factors[name] * value for name, value in values.items()]).sum()
    return {"loss": weighted} | {f"loss/{name}": value.detach() for name, value in values.items()}


def total(losses: Losses) -> Tensor:
    return losses["loss"] if isinstance(losses, dict) else losses


def pick(name: str, outputs: Any, targets: Any) -> tuple[Any, Any]:
    """The output and target of one named loss."""
    chosen = []
    for kind, values in (("outputs", outputs), ("targets", targets)):
        if isinstance(values, Mapping):
            if name not in values:
                raise UserError(
                    f"the loss {name!r} finds no {kind} of that name, only {', '.join(map(str, values))}",
                    where="get_criterion",
                    fix=f"give the loss and the {kind} the same key",
                )
            values = values[name]
        chosen.append(values)
    return chosen[0], chosen[1]


def spread(values: Any, count: int, kind: str) -> Sequence[Any]:
    """k values for k losses; anything but a tuple or list is shared by all."""
    if not isinstance(values, (tuple, list)):
        return [values] * count
    if len(values) != count:
        raise UserError(
            f"{count} losses but {len(values)} {kind}",
            where="get_criterion",
            fix=f"return as many {kind} as losses, or one tensor for all of them",
        )
    return values


def loss_names(criterion: Criterion) -> list[str]:
    """The names of the parts; none where there is but one loss."""
    if isinstance(criterion, Mapping):
        return list(criterion)
    return part_names(criterion) if isinstance(criterion, Sequence) else []


def part_names(criterion: Sequence[Loss]) -> list[str]:
    """The class or function name of each loss, numbered where it comes twice."""
    plain = [getattr(loss, "__name__", type(loss).__name__) for loss in criterion]
    return [
        name if plain.count(name) == 1 else f"{name}_{plain[:place].count(name)}" for place, name in enumerate(plain)
    ]


def by_name(weights: Weights, names: list[str]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if not isinstance(weights, Mapping) or set(weights) != set(names):
        given = ", ".join(weights) if isinstance(weights, Mapping) else weights
        raise UserError(f"loss_weights are given for {given}, the losses are {', '.join(names)}", where="loss_weights")
    return dict(weights)


def by_place(weights: Weights, names: list[str]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if not isinstance(weights, Sequence) or len(weights) != len(names):
        given = len(weights) if isinstance(weights, Sequence) else weights
        raise UserError(f"{given} loss_weights for {len(names)} losses", where="loss_weights")
    return dict(zip(names, weights))
