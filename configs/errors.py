"""Errors a user can cause: one block that says what, where and what to do, and an exit code."""

import difflib

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")


class UserError(Exception):
    """A fault with its place and its cure; scripts print it as one block, without a traceback."""

    exit_code = 1
    of_one_process = False  # True: the other processes do not meet it, so that this one has to tell

    def __init__(self, what: str, *, where: str = "", fix: str = ""):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class ConfigError(UserError):
    """A flag, a YAML key or a combination of them that cannot be run."""

    exit_code = 2


class DataError(UserError):
    """Data that cannot be trained on: missing, empty, mislabelled."""


class Diverged(UserError):
    """A loss or gradient that is not finite."""

    exit_code = 3


def is_of_another_process(error: BaseException) -> bool:
    """Whether this process only met the end of another."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER)


def nearest(name: str, names: list[str]) -> str:
    """'did you mean ...?' for an error about an unknown name; else some of the names."""
    if found := difflib.get_close_matches(name, names, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(found)}?"
    return f"one of: {', '.join(sorted(names)[:12])}" + (", ..." if len(names) > 12 else "")
