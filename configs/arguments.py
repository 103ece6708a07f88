"""From flags and YAML to a Config, without importing torch: flags > YAML > defaults."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError, nearest
from configs.names import check_text
from configs.options import Config, DataOptions, ModelOptions, OptimOptions, RunOptions
from configs.secrets import FIX, SECRET_NAME, hide_secrets, shown
from configs.telling import tell_once
from configs.values import HINTS, value_of
from configs.yaml_file import read_yaml

SECTIONS = {"data": DataOptions, "model": ModelOptions, "optim": OptimOptions, "run": RunOptions}
# What names a run or its place is not part of what the run is: `--config runs/x/config.yaml` repeats it anew.
NOT_SAVED = (
    "experiment_name", "output_dir", "resume", "fresh", "stop_after_steps", "use_multigpu", "expect_processes", "check",
    "debug",
)  # fmt: skip
FLAGS = HINTS | {"config": str | None, "print_config": bool}
# What a flag without a value means.
BARE_FLAGS = {"mixed_precision": "auto", "grad_clip": "1.0"} | {n: "true" for n, hint in FLAGS.items() if hint is bool}


@dataclass(frozen=True)
class CommandLine:
    """What --help tells."""

    config: str | None = None
    """YAML file of options; flags win over it."""
    print_config: bool = False
    """Print the resolved options as YAML and stop."""
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    optim: OptimOptions = OptimOptions()
    run: RunOptions = RunOptions()


def parse(argv: list[str], *, prog: str = "train.py") -> Config:
    """The Config of a command line. Prints help or the fault and exits (0 or 2) where there is no run to do."""
    if "--help" in argv or "-h" in argv:
        print_help(prog)
    try:
        given = read_flags(argv)
        printed = given.pop("print_config", False)
        path = given.pop("config", None)
        if path is None:
            path = config_of_resumed_run(given.get("resume"))
        else:
            check_text("config", path)
        config = resolve(Path(path), given) if path else Config(**given)
    except ConfigError as error:
        tell_once(hide_secrets(str(error)))
        raise SystemExit(error.exit_code) from None
    if printed:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def print_help(prog: str) -> None:
    """Print all flags by their groups and exit."""
    import tyro  # takes longer than all else here

    tyro.cli(
        CommandLine,
        args=["--help"],
        prog=prog,
        description="Train a model. Every option is also a key of a YAML file given with --config.",
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )


def read_flags(argv: list[str]) -> dict[str, Any]:
    """The options that the flags give; of one given twice the last. No error repeats a word that belongs to no flag."""
    words: dict[str, list[str]] = {}
    name = ""
    for place, word in enumerate(argv, 1):
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name, words_of_flag = _name_of(flag)
            words[name] = [*words_of_flag, value] if equals else words_of_flag
        elif name:
            words[name].append(word)
        else:
            raise ConfigError(f"word {place} of the command line belongs to no flag", fix="flags begin with --")
    bare = {name: [BARE_FLAGS[name]] for name, given in words.items() if not given and name in BARE_FLAGS}
    return {name: value_of(name, given, FLAGS[name]) for name, given in (words | bare).items()}


def _name_of(flag: str) -> tuple[str, list[str]]:
    """The option that a flag names, and its value where --no_... gives it."""
    name = flag.replace("-", "_")
    if name in FLAGS:
        return name, []
    if name.startswith("no_") and FLAGS.get(name[3:]) is bool:
        return name[3:], ["false"]
    fix = FIX if SECRET_NAME.search(name[:100]) else nearest(name[:100], list(FLAGS))
    raise ConfigError(f"unknown flag {shown('--' + name)[1:-1]}", fix=fix)


def resolve(path: Path, given: dict[str, Any]) -> Config:
    """The file's options under those given; a fault of the file alone names it."""
    in_file: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in read_yaml(path).items()
    }
    try:
        return Config(**(in_file | given))
    except ConfigError as error:
        if _fault(in_file) == str(error):
            error.where = str(path)
        raise


def _fault(values: dict[str, Any]) -> str:
    try:
        Config(**values)
    except ConfigError as error:
        return str(error)
    return ""


def config_of_resumed_run(resume: str | None) -> str | None:
    """`--resume PATH` alone takes the options of that run, so that its command need not be repeated."""
    if resume in (None, "auto", "never"):
        return None
    check_text("resume", resume)
    try:
        folder = Path(resume).resolve()
        for candidate in (folder, folder.parent.parent):
            if (candidate / "config.yaml").is_file():
                return str(candidate / "config.yaml")
    except (OSError, RuntimeError) as error:  # too long a name; links that lead to each other
        raise ConfigError(f"--resume {shown(resume)} cannot be opened: {type(error).__name__}") from None
    raise ConfigError(
        f"--resume {shown(resume)} is neither a run folder nor a checkpoint of one: no config.yaml there",
        fix="give runs/NAME or runs/NAME/checkpoints/step_XXXXXXXX",
    )


def make_config(**options: Any) -> Config:
    """A Config from keywords, for notebooks and tests; an unknown name is refused with the nearest."""
    for name in options:
        if name not in HINTS:
            raise ConfigError(f"unknown option {shown(name)}", fix=nearest(name, list(HINTS)))
    return Config(**options)


def to_yaml(config: Config, *, without: tuple[str, ...] = ()) -> str:
    """The config as YAML that `--config` reads back."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if name not in without
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=float("inf"))
