"""Tokens and passwords are no options: a config is saved, logged and published. What looks like one is found here."""

from __future__ import annotations

import re
from urllib.parse import unquote

FIX = "set HF_TOKEN or WANDB_API_KEY, write ~/.netrc, or log in with `hf auth login`: options are saved and published"

NAMES = r"token|secret|password|passwd|pwd|pass|credentials?|signature|sig|api[_-]?key|access[_-]?key|key|auth"
SECRET_NAME = re.compile(rf"(?:^|[_-])(?:{NAMES})s?$", re.IGNORECASE)
# Tokens by the beginnings that their makers gave them; an ordinary name rarely has so long a word after it.
TOKENS = r"""(?<![A-Za-z0-9])(?:
    hf_(?:(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{16,}|[a-z]{30,})
    | gh[oprsu]_[A-Za-z0-9]{20,} | github_pat_\w{20,} | glpat-[\w-]{20,}
    | wandb_v1_\w{20,} | A[KS]IA[0-9A-Z]{16} | AIza[\w-]{35} | eyJ[\w-]{10,}\.eyJ[\w-]{10,}
)"""
# user:password@ (not the port of host:80/, not zip://a::b), and https://token@
LOGINS = r"""(?<=//)[^/?\#\s@:[]*:(?!:|\d{0,5}(?:[/?\#]|$))\S*(?=@)
    | (?i:(?<=https://)|(?<=http://))[^/?\#\s@:]+(?=@)"""
QUERIES = rf"(?P<name>(?i:[?&\#](?:[\w%.-]{{0,40}}[_.-])?(?:[a-z]{{0,20}}token|awsaccesskeyid|{NAMES})=))[^&\s]+"
SECRET = re.compile(f"{TOKENS} | {LOGINS} | {QUERIES}", re.VERBOSE)


def holds_secret(text: str) -> bool:
    """Whether a text holds a token, a login in a URL, or a query parameter that is a token or a signature."""
    return bool(SECRET.search(text) or SECRET.search(unquote(text)))


def hide_secrets(text: str) -> str:
    """The text with *** for each secret."""
    return SECRET.sub(r"\g<name>***", text)


def hide_in_command(arguments: list[str]) -> list[str]:
    """A command line that may be shown: *** also for whatever follows a flag named like `--token` or `--api-key`."""
    hidden, follows_name = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_name = bool(SECRET_NAME.search(name)) and (bool(equals) or name.startswith("-"))
        if is_name and equals:
            hidden.append(f"{name}=***")
        elif follows_name and not argument.startswith("--"):
            hidden.append("***")
        else:
            hidden.append(hide_secrets(argument))
        follows_name = is_name and not equals
    return hidden


def shown(text: str) -> str:
    """A text for an error: in quotes, escaped, cut, without secrets."""
    clear = hide_secrets(text[:4000])
    return repr(clear if len(clear) <= 60 else clear[:57] + "...")
