"""From flags and YAML to a Config, without importing torch: flags > YAML > defaults."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import tyro
import yaml

from configs.errors import ConfigError
from configs.options import Config, DataOptions, ModelOptions, OptimOptions, RunOptions, nearest

SECTIONS = {"data": DataOptions, "model": ModelOptions, "optim": OptimOptions, "run": RunOptions}
# What names a run or its place is not part of what the run is: `--config runs/x/config.yaml` repeats it anew.
NOT_SAVED = ("experiment_name", "output_dir", "resume", "fresh", "stop_after_steps", "check", "debug")
BARE_FLAGS = {"--mixed_precision": "auto", "--grad_clip": "1.0"}
HINTS = get_type_hints(Config)


@dataclass(frozen=True)
class CommandLine:
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
    try:
        return _parse(argv, prog)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _parse(argv: list[str], prog: str) -> Config:
    flags = _fill_bare_flags([_underscored(flag) for flag in argv])
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--resume")
    known, _ = early.parse_known_args(flags)
    path: str | None = known.config or config_of_resumed_run(known.resume)
    yaml_flags = flags_of_yaml(Path(path)) if path else []
    if path and yaml_flags:
        _check_yaml(yaml_flags, path, prog)
    line = tyro.cli(
        CommandLine,
        args=[*yaml_flags, *flags],
        prog=prog,
        description="Train a model. Every option is also a key of a YAML file given with --config.",
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    config = flatten(line)
    if line.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def flatten(line: CommandLine) -> Config:
    """One flat Config from the sections that give the help its groups."""
    values: dict[str, Any] = {}
    for section in SECTIONS:
        values |= asdict(getattr(line, section))
    return Config(**values)


def config_of_resumed_run(resume: str | None) -> str | None:
    """`--resume PATH` alone takes the options of that run, so that its command need not be repeated."""
    if resume in (None, "auto", "never"):
        return None
    folder = Path(str(resume)).resolve()
    for candidate in (folder, folder.parent.parent):
        if (candidate / "config.yaml").is_file():
            return str(candidate / "config.yaml")
    raise ConfigError(
        f"--resume {resume} is neither a run folder nor a checkpoint of one: no config.yaml there",
        fix="give runs/NAME or runs/NAME/checkpoints/step_XXXXXXXX",
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a flat YAML file of options; an unknown key is refused with the nearest name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config: {error.strerror or error}", where=str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"no valid YAML: {' '.join(str(error).split())}", where=str(path)) from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"expected `key: value` lines, found {type(content).__name__}", where=str(path))
    for key in content:
        if key not in HINTS:
            raise ConfigError(f"unknown key {key!r}", where=str(path), fix=nearest(str(key), list(HINTS)))
    return content


def flags_of_yaml(path: Path) -> list[str]:
    """The YAML file as flags, so that both are typed by the same rules (YAML reads 1e-3 as text and no as False)."""
    flags = []
    for key, value in read_yaml(path).items():
        fault = wrong_type(key, value)
        if fault:
            raise ConfigError(f"{key}: {fault}", where=str(path))
        if value is False and HINTS[key] is not bool:
            value = "no"
        if HINTS[key] is bool:
            if not isinstance(value, bool):
                raise ConfigError(f"{key}: {value} is neither true nor false", where=str(path))
            flags.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        else:
            flags.append(f"--{key}={value}")
    return flags


def wrong_type(key: str, value: Any) -> str:
    """What the flags' own typing would not notice, since it sees text only; '' where nothing is wrong."""
    if value is None and HINTS[key] in (str, int, float, bool):
        return f"needs a value of type {HINTS[key].__name__}, not null"
    if value is True and HINTS[key] is not bool:
        return "true (or yes, or on) is no value for it; write text in quotes"
    if isinstance(value, list) and get_origin(HINTS[key]) is not tuple:
        return f"takes one value, not the list {value}"
    return ""


def _check_yaml(yaml_flags: list[str], path: str, prog: str) -> None:
    """Type the YAML values alone first: a fault in them names the file."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            line = tyro.cli(
                CommandLine,
                args=yaml_flags,
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
        flatten(line)
    except SystemExit:
        # tyro's box holds a title, the fault and the help, parted by rules
        lines = [line.strip("│|╭╰╮╯+ ") for line in said.getvalue().splitlines()]
        rules = [number for number, line in enumerate(lines) if not line.strip("─-")] + [len(lines)]
        fault = lines[rules[0] + 1 : rules[1]] if rules[0] <= 1 else lines[1 : rules[0]]
        raise ConfigError(" ".join(" ".join(fault).split()), where=path) from None
    except ConfigError as error:
        error.where = error.where or path
        raise


def _underscored(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if flag.startswith("--") else flag


def _fill_bare_flags(flags: list[str]) -> list[str]:
    following = [*flags[1:], "--"]
    return [
        f"{flag}={BARE_FLAGS[flag]}" if flag in BARE_FLAGS and after.startswith("--") else flag
        for flag, after in zip(flags, following)
    ]


def make_config(**options: Any) -> Config:
    """A Config from keywords, for notebooks and tests; an unknown name is refused with the nearest."""
    for name in options:
        if name not in HINTS:
            raise ConfigError(f"unknown option {name!r}", fix=nearest(name, list(HINTS)))
    return Config(**options)


def to_yaml(config: Config, *, without: tuple[str, ...] = ()) -> str:
    """The config as YAML that `--config` reads back."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if name not in without
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=float("inf"))
