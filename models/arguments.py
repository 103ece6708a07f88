"""What a model's constructor takes: the arguments of `--model_args` are held against it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from models.base_model import ModelError

# Arguments that --model_args cannot give, and what gives them.
GIVEN = {
    "num_classes": "the data", "heads": "the data", "tokenizer": "the data",
    "in_channels": "--channels", "in_chans": "--channels",
    "image_size": "--image_size", "img_size": "--image_size", "input_size": "--image_size",
    "dropout": "--dropout", "drop_rate": "--dropout", "learnt_weights": "--loss_weights", "architecture": "--model",
    "weights": "--weights", "weights_backbone": "--weights", "pretrained": "--pretrained",
}  # fmt: skip
NOT_TAKEN = ("self", "progress", "image_mean", "image_std", "num_anchors", "aux_logits", "init_weights")
Parameters = dict[str, inspect.Parameter]


def parameters_of(builder: Callable[..., Any], *, with_default: bool = False) -> Parameters:
    """Those that can be named, with types in place of their names; of a class those of its constructor."""
    while isinstance(builder, partial):
        builder = builder.func
    function = builder.__init__ if isinstance(builder, type) else builder  # type: ignore[misc]
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # a name that only type checkers import
        hints = {}
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in NOT_TAKEN
        and name not in GIVEN
        and not (with_default and parameter.default is parameter.empty)
    }


def takes_more(builder: Callable[..., Any]) -> bool:
    """Whether it takes arguments that its signature does not name."""
    while isinstance(builder, partial):
        builder = builder.func
    function = builder.__init__ if isinstance(builder, type) else builder  # type: ignore[misc]
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values())


def parameters_of_module(module: ModuleType) -> Parameters:
    """What the classifiers of a library's module may be told: the defaults of its networks and of its functions that
    hand arguments on."""
    found: Parameters = {}
    for item in vars(module).values():
        if getattr(item, "__module__", None) != module.__name__ or not callable(item):
            continue
        is_network = isinstance(item, type) and issubclass(item, nn.Module) and "num_classes" in names_of(item)
        if is_network or (inspect.isfunction(item) and takes_more(item)):
            found |= parameters_of(item, with_default=True)
    return found


def names_of(network: type) -> Iterable[str]:
    return inspect.signature(network.__init__).parameters  # type: ignore[misc]


def check_arguments(model: str, takes: Parameters, given: Mapping[str, Any]) -> None:
    """Raises ModelError for an argument that the model does not take, that is given elsewhere, or of a wrong type."""
    for name, value in given.items():
        if name in GIVEN:
            raise ModelError(f"{name} of {model} is not for --model_args: it comes from {GIVEN[name]}")
        if name not in takes:
            near = difflib.get_close_matches(name, takes, n=2, cutoff=0.5)
            asked = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ModelError(f"{model} takes no argument {name[:60]!r}{asked}; it takes {listed(takes)}")
        wanted = takes[name].annotation
        if not fits(value, wanted):
            raise ModelError(
                f"{name} of {model} is {value!r:.60}, it must be {named(wanted)}; it takes {listed(takes)}"
            )


def listed(takes: Parameters) -> str:
    """The names with their defaults."""
    shown = [f"{p.name}={p.default}" if is_plain(p.default) else p.name for p in takes.values()]
    return ", ".join(shown[:30]) + (f" and {len(shown) - 30} more" if len(shown) > 30 else "") or "none"


def is_plain(default: Any) -> bool:
    return default is None or isinstance(default, (bool, int, float, str, list, tuple))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML may be this argument. Lists stand for tuples."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return True
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if kind is Literal:
        return value in inner
    if kind in (list, tuple) or getattr(kind, "__name__", "") in ("Sequence", "Iterable"):
        inner = [one for one in inner if one is not Ellipsis]  # type: ignore[assignment]
        return isinstance(value, list) and all(any(fits(item, one) for one in inner or [Any]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, dict, NoneType):
        return isinstance(value, kind)
    return not isinstance(kind, type)


def named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
