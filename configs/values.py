"""From the words of a flag or a YAML key to the value of an option, by the type of its field."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs.errors import ConfigError
from configs.options import Config
from configs.secrets import shown

HINTS = get_type_hints(Config)
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


def value_of(name: str, words: Sequence[str], hint: Any) -> Any:
    """The words as a value of this type. Raises ConfigError where they are none."""
    kind = type_of(hint)
    if kind is not hint and list(words) == ["None"]:
        return None
    kinds = get_args(kind) if get_origin(kind) is tuple else (kind,)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(words)
    if len(kinds) != len(words):
        expected = "one value" if len(kinds) == 1 else f"{len(kinds)} values"
        raise ConfigError(f"--{name} takes {expected}, not {len(words)}")
    values = tuple(_value(name, word, kind) for word, kind in zip(words, kinds))
    return values if get_origin(kind) is tuple else values[0]


def type_of(hint: Any) -> Any:
    """The type without `| None`."""
    return next(kind for kind in get_args(hint) if kind is not NoneType) if NoneType in get_args(hint) else hint


def _value(name: str, word: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if word not in choices:
            raise ConfigError(f"--{name} is {shown(word)}", fix=f"one of: {', '.join(choices)}")
        return choices[word]
    try:
        if kind is bool:
            return [*FALSE, *TRUE].index(word.lower()) >= len(FALSE)
        return kind(word)
    except ValueError:
        raise ConfigError(f"--{name} is {shown(word)}: it must be {KINDS.get(kind, kind.__name__)}") from None
