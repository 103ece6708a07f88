"""runs/<experiment_name>/: what a run writes, and what it finds there when it comes back."""

from __future__ import annotations

import errno
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.arguments import NOT_SAVED, read_yaml, to_yaml
from configs.errors import ConfigError, UserError
from configs.options import Config
from configs.secrets import hide_in_command, hide_secrets
from trainer import checkpoint

# What may differ when a run is continued; anything else would make it another run.
MAY_CHANGE = {
    "epochs", "max_steps", "num_workers", "cpu_threads", "log_every", "save_every_steps", "save_every_minutes",
    "keep_last", "keep_best", "use_tensorboard", "use_wandb", "wandb_project", "push_to_hub", "hub_model_id",
    "trace_samples", "early_stopping", "patience", "test_data_dir", "max_bad_fraction", "nonfinite", "max_nonfinite",
    "gradient_checkpointing", "find_unused_parameters",
}  # fmt: skip

LINES = ("metrics.jsonl", "samples.jsonl", "bad_samples.jsonl")


class RunFolder:
    """Paths and files of one run. Only the main process writes."""

    def __init__(self, path: Path, *, writes: bool = True):
        self.writes = writes
        self.move_to(path)
        self._metrics: Any = None
        self._samples: Any = None
        self._lock: Any = None
        with self.telling():
            self.known = path.is_dir()  # at the start: a folder that appears later is another run's

    def lock(self) -> None:
        """Keep other processes out as long as this one lives. Raises ConfigError where one is in the folder.

        A record lock: the kernel drops it with the process, even a killed one, and loader processes do not inherit it.
        """
        if not self.writes or self._lock or not self.path.is_dir():
            return
        try:
            import fcntl
        except ImportError:  # Windows
            return
        with self.telling():
            file = (self.path / ".lock").open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a filesystem without locks
            raise ConfigError(
                f"the run is being trained by {owner}",
                where=str(self.path),
                fix="wait for it or stop it; or choose another --experiment_name, or --fresh for a new folder",
            ) from None
        self._lock = file
        with suppress(OSError):  # of a full disk; the name is for others to read
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()

    @property
    def locked(self) -> bool:
        return self._lock is not None

    def create(self, *, only_new: bool) -> bool:
        """Make the folder and lock it. only_new: one that exists belongs to another run, so take the next free name;
        True where that happened."""
        if not self.writes:
            return False
        path = self.path
        with self.telling():
            while True:
                try:
                    self.path.mkdir(parents=True, exist_ok=self.known)
                    break
                except FileExistsError:
                    if only_new:
                        self.move_to(free_name(path))
                    elif self.path.is_dir():  # its lock is the other's to take, which may be about to
                        raise ConfigError(
                            "another start has taken the name just now",
                            where=str(self.path),
                            fix="the same command continues that run now; or choose another --experiment_name",
                        ) from None
                    else:
                        raise
            self.known = True
            self.checkpoints.mkdir(exist_ok=True)
        self.lock()
        return self.path != path

    def move_to(self, path: Path) -> None:
        self.path, self.checkpoints, self.best = path, path / "checkpoints", path / "best"

    def open(self, config: Config, environment: dict[str, Any]) -> None:
        """Write what the run is, and begin its files of lines."""
        if not self.writes:
            return
        with self.telling():
            write_whole(self.path / "config.yaml", saved_yaml(config))
            write_whole(self.path / "env.json", json.dumps(environment, indent=1))
            self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)
            if config.trace_samples:
                self._samples = (self.path / "samples.jsonl").open("a", buffering=1)

    @contextmanager
    def telling(self, what: str = "the run folder") -> Iterator[None]:
        """What keeps it from being written becomes a UserError that names the folder."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {what}: {error.strerror}",
                where=str(self.path),
                fix="free some space or make it writable, or choose another --output_dir; what was saved stands",
            ) from error

    def log(self, kind: str, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self._metrics:
            self._write(self._metrics, {"kind": kind, **values})

    def log_samples(self, step: int, epoch: int, ids: list[int]) -> None:
        if self._samples:
            self._write(self._samples, {"step": step, "epoch": epoch, "ids": ids})

    def log_bad_sample(self, line: dict[str, Any]) -> None:
        if self.writes:
            with self.telling(), (self.path / "bad_samples.jsonl").open("a") as file:
                self._write(file, {name: hide_secrets(v) if isinstance(v, str) else v for name, v in line.items()})

    def _write(self, file: Any, line: dict[str, Any]) -> None:
        with self.telling(f"a line of {Path(file.name).name}"):
            file.write(json.dumps(line) + "\n")

    def status(self, state: str, **values: Any) -> None:
        """status.json: the truth about how a run ended, whatever the launcher says."""
        if self.writes and self.path.is_dir():
            with self.telling():
                told = {name: hide_secrets(v) if isinstance(v, str) else v for name, v in values.items()}
                write_whole(self.path / "status.json", json.dumps({"state": state, **told}, indent=1))

    def read_status(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def set_back(self, step: int, evaluated_step: int) -> None:
        """Forget the lines of steps and evaluations that will be done again, and a last line that a kill cut off."""
        for name in LINES if self.writes else ():
            path = self.path / name
            if path.is_file():
                kept = [
                    line for line in path.read_text(errors="replace").splitlines() if stands(line, step, evaluated_step)
                ]
                with self.telling():
                    write_whole(path, "".join(line + "\n" for line in kept))

    def make_durable(self) -> None:
        """What a checkpoint of now goes with: its lines, and that best/ is there."""
        for path in (*(self.path / name for name in LINES), self.best, self.path):
            if path.exists():
                checkpoint.sync(path)

    def close(self) -> None:
        for file in (self._metrics, self._samples, self._lock):
            if file:
                with suppress(OSError):  # of a full disk; it has been told
                    file.close()
        self._metrics = self._samples = self._lock = None


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    checkpoint.sync(partial)  # or a power cut may leave the new name with no content
    os.replace(partial, path)


def stands(line: str, step: int, evaluated_step: int) -> bool:
    """Whether a line is of what the run goes on from; a look at the test set stays, whatever is done again."""
    try:
        entry = json.loads(line)
        kind = entry.get("kind")
        return kind == "test" or entry["step"] <= (evaluated_step if kind in ("epoch", "val") else step)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def saved_yaml(config: Config) -> str:
    """The config without the names of this run, so that `--config` repeats it without continuing it."""
    return to_yaml(config, without=NOT_SAVED)


def find(config: Config) -> Path:
    """The folder of this run. Raises ConfigError where there is one that must not be touched."""
    root = Path(config.output_dir)
    if config.resume not in ("auto", "never"):
        given = Path(config.resume).resolve()
        return given.parent.parent if checkpoint.step_of(given) is not None else given
    if config.experiment_name is None:
        data = re.sub("[^A-Za-z0-9._-]+", "-", Path(config.train_data_dir or config.dataset).name)[:60]
        model = str(config.model).replace("/", "-")
        return free_name(root / (time.strftime("%Y%m%d-%H%M%S-") + f"{model}-{data}"))
    path = root / config.experiment_name
    if config.resume == "never" and path.exists():
        raise ConfigError(
            f"--resume never, but {path} exists",
            fix="choose another --experiment_name, or leave --resume out to continue it",
        )
    return free_name(path) if config.fresh else path


def free_name(path: Path) -> Path:
    """The path itself, or with the first number that is free: x, x-2, x-3, ..."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(found for found in itertools.chain([path], numbered) if not found.exists())


def find_checkpoint(config: Config, path: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, None for a new run; and lines to tell about it.

    Raises UserError where it is damaged, or where there are some and none is intact.
    """
    given = Path(config.resume).resolve()
    if config.resume not in ("auto", "never") and checkpoint.step_of(given) is not None:
        if wrong := checkpoint.fault(given):
            raise UserError(
                f"the checkpoint is damaged: {wrong}", where=str(given), fix=f"--resume {given.parent.parent}"
            )
        return given, []
    return checkpoint.newest_valid(path / "checkpoints")


def check_same_run(config: Config, path: Path) -> list[str]:
    """Compare with the run's own config.yaml: a line for each allowed change; ConfigError for any other."""
    now = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()}
    begun = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(Config()).items()}
    before = begun | read_yaml(path / "config.yaml")  # what is not in it, an option of later, was as by default
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
        "command": [Path(sys.argv[0]).name, *hide_in_command(sys.argv[1:])],
        **values,
    }


def git_commit() -> str | None:
    try:
        root = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5)
        return found.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
