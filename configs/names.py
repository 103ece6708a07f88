"""What a text option may hold: no secret, nothing that breaks a line, and no name that leads out of its folder."""

from __future__ import annotations

import re
from typing import Any

from configs.errors import ConfigError
from configs.secrets import FIX, holds_secret, shown

LONGEST = 4096  # characters; no path of Linux is longer
LONGEST_LIST = 200_000  # bytes, so that the file in which a config is saved can be read again
BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control characters, lines, halves of characters
FOLDER = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{PART}/)?{PART}")
OF_WINDOWS = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)  # names of devices, not of files


def check_texts(name: str, value: Any) -> None:
    """Raise ConfigError for an option's value that is or lists a text it cannot hold."""
    texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
    for text in texts:
        check_text(name, text)
    if sum(len(text.encode()) + 8 for text in texts) > LONGEST_LIST:
        raise ConfigError(f"--{name} lists {len(texts):,} names: too long a list", fix="give a pattern in quotes")


def check_text(name: str, text: str) -> None:
    """Raise ConfigError for a text that the option cannot hold."""
    if not text:
        raise ConfigError(f"--{name} is empty", fix="leave it out")
    if len(text) > LONGEST:
        raise ConfigError(f"--{name} has {len(text):,} characters, at most {LONGEST:,} are read")
    if holds_secret(text):
        raise ConfigError(f"--{name} holds a token, a password or a signature", fix=FIX)
    if found := BREAKS.search(text):
        raise ConfigError(f"--{name} holds {found[0]!r} at place {found.start() + 1}: no name or path can have that")
    if text.startswith("-"):
        raise ConfigError(f"--{name} is {shown(text)}, which reads like a flag", fix="write ./ before a path")
    if name == "experiment_name" and (not FOLDER.fullmatch(text) or OF_WINDOWS.fullmatch(text)):
        raise ConfigError(
            f"--experiment_name {shown(text)} is no safe folder name",
            fix="use at most 100 letters, digits, '.', '_' and '-', with no '.' at either end, no '-' at the beginning",
        )
    if name == "hub_model_id" and (len(text) > 96 or not REPOSITORY.fullmatch(text)):
        raise ConfigError(
            f"--hub_model_id {shown(text)} is no name of a repository",
            fix="write user/name: at most 96 letters, digits and single '.', '_' and '-' between them",
        )
    if name == "wandb_project" and (len(text) > 128 or re.search(r"[/\\#?%:]", text) or not text.strip(". ")):
        raise ConfigError(
            f"--wandb_project {shown(text)} is no name of a project",
            fix="use at most 128 characters, none of / \\ # ? % :",
        )
