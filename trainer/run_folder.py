"""runs/<experiment_name>/: what a run writes, and what it finds there when it comes back."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.arguments import NOT_SAVED, read_yaml, to_yaml
from configs.errors import ConfigError, UserError
from configs.options import Config
from trainer import checkpoint

# What may differ when a run is continued; anything else would make it another run.
MAY_CHANGE = {
    "epochs", "max_steps", "num_workers", "cpu_threads", "log_every", "save_every_steps", "keep_last", "keep_best",
    "use_tensorboard", "use_wandb", "wandb_project", "push_to_hub", "hub_model_id", "trace_samples", "debug",
    "stop_after_steps", "early_stopping", "patience", "resume", "experiment_name", "output_dir", "test_data_dir",
    "max_bad_fraction",
}  # fmt: skip


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, path: Path, *, writes: bool = True):
        self.path, self.writes = path, writes
        self.checkpoints, self.best = path / "checkpoints", path / "best"
        self._metrics: Any = None
        self._samples: Any = None

    def open(self, config: Config, environment: dict[str, Any]) -> None:
        """Make the folder and write what the run is."""
        if not self.writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "config.yaml", saved_yaml(config))
            write_whole(self.path / "env.json", json.dumps(environment, indent=1))
            self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)
            if config.trace_samples:
                self._samples = (self.path / "samples.jsonl").open("a", buffering=1)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder: {error.strerror}",
                where=str(self.path),
                fix="choose another --output_dir",
            ) from None

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._metrics:
            self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")

    def log_samples(self, step: int, epoch: int, ids: list[int]) -> None:
        if self._samples:
            self._samples.write(json.dumps({"step": step, "epoch": epoch, "ids": ids}) + "\n")

    def log_bad_sample(self, line: dict[str, Any]) -> None:
        if self.writes:
            with (self.path / "bad_samples.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def status(self, state: str, **values: Any) -> None:
        """status.json: the truth about how a run ended, whatever the launcher says."""
        if self.writes and self.path.is_dir():
            write_whole(self.path / "status.json", json.dumps({"state": state, **values}, indent=1))

    def read_status(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def set_back(self, step: int) -> None:
        """Forget the lines of steps that will be done again, and a last line that a kill cut off."""
        for name in ("metrics.jsonl", "samples.jsonl", "bad_samples.jsonl") if self.writes else ():
            path = self.path / name
            if path.is_file():
                kept = [line for line in path.read_text().splitlines() if is_at_most(line, step)]
                write_whole(path, "".join(line + "\n" for line in kept))

    def close(self) -> None:
        for file in (self._metrics, self._samples):
            if file:
                file.close()
        self._metrics = self._samples = None


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def is_at_most(line: str, step: int) -> bool:
    """A look at the test set stays on record, whatever is done again."""
    try:
        entry = json.loads(line)
        return entry.get("kind") == "test" or entry["step"] <= step
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def saved_yaml(config: Config) -> str:
    """The config without the names of this run, so that `--config` repeats it without continuing it."""
    return to_yaml(config, without=NOT_SAVED)


def find(config: Config) -> tuple[Path, Path | None, list[str]]:
    """The folder of this run, the checkpoint it continues from, and lines to tell about it.

    Raises where there is a run that must not be touched, or none to continue.
    """
    root = Path(config.output_dir)
    if config.resume not in ("auto", "never"):
        given = Path(config.resume).resolve()
        if checkpoint.step_of(given) is not None:
            wrong = checkpoint.fault(given)
            if wrong:
                raise UserError(
                    f"the checkpoint is damaged: {wrong}",
                    where=str(given),
                    fix=f"--resume {given.parent.parent}",
                )
            return given.parent.parent, given, []
        newest, lines = checkpoint.newest_valid(given / "checkpoints")
        return given, newest, lines
    if config.experiment_name is None:
        stem = time.strftime("%Y%m%d-%H%M%S-") + f"{config.model}-{Path(config.train_data_dir or config.dataset).name}"
        names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
        return next(root / name for name in names if not (root / name).exists()), None, []
    path = root / config.experiment_name
    newest, lines = checkpoint.newest_valid(path / "checkpoints")
    if config.resume == "never" and path.exists():
        raise ConfigError(
            f"--resume never, but {path} exists",
            fix="choose another --experiment_name, or leave --resume out to continue it",
        )
    return path, newest, lines


def check_same_run(config: Config, path: Path) -> list[str]:
    """Compare with the run's own config.yaml: a line for each allowed change; ConfigError for any other."""
    before = read_yaml(path / "config.yaml")
    now = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
    changed = [name for name in before if before[name] != now[name] and name not in NOT_SAVED]
    refused = [name for name in changed if name not in MAY_CHANGE]
    if refused:
        raise ConfigError(
            "the run was begun with other options: "
            + "; ".join(f"--{name} was {before[name]}, now {now[name]}" for name in refused),
            where=str(path / "config.yaml"),
            fix="continue with the same options, or begin a run of another --experiment_name",
        )
    return [f"--{name} was {before[name]}, now {now[name]}" for name in changed]


def environment(device: str, **values: Any) -> dict[str, Any]:
    """Versions, machine and command; nothing secret."""
    import accelerate
    import torch
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "device": device,
        "git_commit": git_commit(),
        "command": [Path(sys.argv[0]).name, *(hide_secret(argument) for argument in sys.argv[1:])],
        **values,
    }


def hide_secret(argument: str) -> str:
    """Tokens never reach a file."""
    return (
        "***"
        if argument.startswith("hf_") or "token" in argument.lower() or ("://" in argument and "@" in argument)
        else argument
    )


def git_commit() -> str | None:
    try:
        root = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5)
        return found.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
