"""`--model_args`: arguments of the model's constructor, NAME=VALUE; a value is what YAML makes of it."""

from __future__ import annotations

import json
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from configs.errors import ConfigError
from configs.secrets import shown

MOST_NODES = 500  # of one value: YAML's aliases may stand for more than any memory holds
TAG = "tag:yaml.org,2002:"
TAGS = [TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")]


def written(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words with each value written in one way, so that equal arguments are equal options."""
    return words_of(read(words))


def read(words: tuple[str, ...]) -> dict[str, Any]:
    """The arguments by their names. Raises ConfigError where they are none."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if not (name.isidentifier() and text):
            raise ConfigError(f"--model_args has {shown(word)}", fix="give NAME=VALUE, for example width=32")
        if name in found:
            raise ConfigError(f"--model_args has {name} twice", fix="leave one of them out")
        found[name] = value_of(text, f"--model_args {shown(name)[1:-1]}")
    return found


def words_of(arguments: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}={text_of(value)}" for name, value in arguments.items())


def text_of(value: Any) -> str:
    """Text that is read as this value: a word alone, or JSON."""
    try:
        if value_of(value, "") == value:
            return value
    except (ConfigError, TypeError, AttributeError):
        pass
    return json.dumps(value, ensure_ascii=False)


def value_of(text: str, what: str) -> Any:
    """None, bool, int, float, text, or lists and mappings of them. what: is named in a ConfigError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
        raise ConfigError(f"{what} is {shown(text)}, which is no YAML") from None
    return value_of_node(node, what)


def value_of_node(node: Node | None, what: str) -> Any:
    nodes = 0

    def value(node: Node) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > MOST_NODES:
            raise ConfigError(f"{what} is too large a value")
        if node.tag not in TAGS:
            raise ConfigError(f"{what}: the tag {shown(node.tag)} is not obeyed", fix="write the value alone")
        if isinstance(node, MappingNode):
            return {str(value(key)): value(item) for key, item in node.value}
        if isinstance(node, SequenceNode):
            return [value(item) for item in node.value]
        assert isinstance(node, ScalarNode)
        return scalar(node)

    try:
        return None if node is None else value(node)
    except RecursionError:
        raise ConfigError(f"{what} is too large a value") from None


def scalar(node: ScalarNode) -> Any:
    """A plain word is a number where Python reads one: YAML 1.1 takes 1e-3 for text, and 1:30 for 90."""
    if node.style in ("'", '"'):
        return node.value
    if node.tag == TAG + "null" or node.value == "None":
        return None
    if node.tag == TAG + "bool":
        return node.value.lower() in ("true", "yes", "on")
    for kind in (int, float):
        try:
            number = kind(node.value)
        except ValueError:
            continue
        if float("-inf") < number < float("inf"):
            return number
    return node.value
