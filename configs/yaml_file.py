"""A YAML file of options, one `key: value` a line: no tag of it is obeyed and no object built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from configs import model_args
from configs.errors import ConfigError, nearest
from configs.secrets import FIX, SECRET_NAME, shown
from configs.values import HINTS, type_of, value_of

LARGEST = 256 * 1024  # bytes of a file: 3 seconds at worst
TAG = "tag:yaml.org,2002:"
SCALARS = [TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp")]


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of the file, typed by the rules of the flags; sequences are lists. Faults name file, line and key."""
    node = _compose(_text_of(path), path)
    if node is None or node.tag == TAG + "null":
        return {}
    if not isinstance(node, MappingNode) or node.tag != TAG + "map":
        found = "a list" if node.tag == TAG + "seq" else "text" if node.tag in SCALARS else f"the tag {shown(node.tag)}"
        raise ConfigError(f"expected `key: value` lines, found {found}", where=str(path))
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        try:
            name = _name(key)
            if name in lines:
                raise ConfigError(f"{name} stands twice, also on line {lines[name]}", fix="leave one of them out")
            lines[name] = line
            values[name] = _typed(name, value)
        except ConfigError as error:
            error.where = f"{path}:{line}"
            raise
    return values


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigError(f"no config: it has more than {LARGEST // 1024} KiB", where=str(path))
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config: {error.strerror or error}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"no valid YAML: byte {error.start} is no UTF-8 text", where=str(path)) from None


def _compose(text: str, path: Path) -> Node | None:
    """The file's tree of texts. A fault is told without the line it stands in, which may hold a secret."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"no valid YAML: {shown(str(error.problem or error.context))[1:-1]}", where=place) from None
    except yaml.YAMLError:
        raise ConfigError("no valid YAML: it holds a control character", where=str(path)) from None
    except RecursionError:
        raise ConfigError("no config: its values are nested", where=str(path)) from None
    except (ValueError, OverflowError):  # escapes of characters that do not exist
        raise ConfigError("no valid YAML: it holds a number or an escape out of range", where=str(path)) from None


def _name(key: Node) -> str:
    name = key.value if isinstance(key, ScalarNode) else "a list or a mapping"
    if name not in HINTS or key.tag != TAG + "str":
        fix = FIX if SECRET_NAME.search(name[:100]) else nearest(name[:100], list(HINTS))
        raise ConfigError(f"unknown key {shown(name)}", fix=fix)
    return name


def _typed(name: str, node: Node) -> Any:
    hint = HINTS[name]
    kind = type_of(hint)
    if node.tag == TAG + "null" and kind is not hint:
        return None
    if name == "model_args" and node.tag == TAG + "map":
        return list(model_args.words_of(model_args.value_of_node(node, "--model_args")))
    if get_origin(kind) is tuple:
        items = node.value if node.tag == TAG + "seq" else [node]
        return list(value_of(name, [_word(name, item) for item in items], hint))
    word = _word(name, node)
    if node.tag == TAG + "bool" and kind is not bool and get_origin(kind) is not Literal:
        raise ConfigError(
            f"--{name} is {word}, which YAML reads as true or false: no value for it", fix="write text in quotes"
        )
    return value_of(name, [word], hint)


def _word(name: str, node: Node) -> str:
    """The text of one value, as it stands in the file."""
    if node.tag in (TAG + "seq", TAG + "map"):
        raise ConfigError(f"--{name} takes no {'list' if node.tag == TAG + 'seq' else 'mapping'} as a value")
    if node.tag not in SCALARS:
        raise ConfigError(f"--{name}: the tag {shown(node.tag)} is not obeyed", fix="write the value alone")
    if node.tag == TAG + "null":
        raise ConfigError(f"--{name} needs a value, not null")
    return node.value
