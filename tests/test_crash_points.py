"""A run survives its process at every file operation: the power may go before any of them.

Each crash happens in a forked process, which an audit hook kills before its n-th operation on the run folder; what the
process had not yet made durable may be cut short as well, as a power failure does. Then the run is continued here.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import exit_code_of, lines_of, same_run
from tests.tiny import tiny_batches, tiny_trainer
from trainer import checkpoint
from trainer.main_trainer import MainTrainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STEPS, EPOCHS, SAVE_EVERY = 4, 3, 3


def batches() -> list[dict[str, torch.Tensor]]:
    plain = enumerate(tiny_batches([8] * STEPS))
    return [{"images_BCHW": x, "labels": y, "ids": torch.arange(8) + 8 * place} for place, (x, y) in plain]


class StoppedByItself(list):
    """A validation set during which the process is asked to stop."""

    def __iter__(self) -> Iterator:
        for batch in super().__iter__():
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def run_of(root: Path, *, stopped_in_evaluation: bool = False, **options) -> MainTrainer:
    plain = {
        "batch_size": 8, "epochs": 1, "ema_decay": 0.9, "save_every_steps": SAVE_EVERY, "trace_samples": True,
        "keep_last": 1, "log_every": 3, "experiment_name": "x",
    }  # fmt: skip
    val = StoppedByItself(batches()) if stopped_in_evaluation else batches()
    return tiny_trainer(root, batches(), val, **(plain | options))


def finish(root: Path, epochs: int = 1) -> None:
    run_of(root, epochs=epochs).train()


def stop_in_evaluation_then_finish(root: Path, epochs: int = 1) -> None:
    """The step at the end of the first epoch is saved twice: before its evaluation and after it."""
    assert run_of(root, epochs=epochs, stopped_in_evaluation=True).train()["state"] == "preempted"
    finish(root, epochs)


class Watch:
    """In the process that is to crash: counts its operations below a folder and knows what it has made durable."""

    def __init__(self, root: Path, at: int, power_fails: bool):
        self.root, self.at, self.power_fails = root, at, power_fails
        self.operations, self.dying = 0, 0  # the thread that ends the process
        self.durable = {version(path) for path in self.files()}
        fsync, rename = os.fsync, os.rename

        def noted_fsync(descriptor: int) -> None:
            self.operation()
            fsync(descriptor)
            self.durable.add(version(descriptor))

        def noted_rename(source: Path, target: Path) -> None:
            rename(source, target)
            if checkpoint.step_of(Path(target)) is not None:
                (root / "committed").touch()

        os.fsync, os.rename = noted_fsync, noted_rename
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & WRITES):
            path = str(arguments[0])
            if not path.startswith("/") or path.startswith(f"{self.root}/x"):  # relative: inside rmtree
                self.operation()

    def operation(self) -> None:
        if self.dying == threading.get_ident():
            return
        while self.dying:  # another thread is at it: nothing happens any more
            time.sleep(1)
        self.operations += 1
        if self.operations == self.at:
            self.dying = threading.get_ident()
            for path in self.files() if self.power_fails else ():
                with suppress(FileNotFoundError):  # C++ and Rust go on without telling us
                    if version(path) not in self.durable:
                        os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def files(self) -> list[Path]:
        return [path for path in self.root.glob("x/checkpoints/*/*") if path.is_file()]


def version(file: Path | int) -> tuple[int, ...]:
    """Another one as soon as the file is written to, or another file takes its name."""
    found = os.stat(file)
    return found.st_ino, found.st_mtime_ns, found.st_size


def crashes(work: Callable[[], object], root: Path, at: int, *, power_fails: bool = False) -> bool:
    """Do the work in a forked process that is killed before its at-th operation; False where it ended before."""

    def watched() -> None:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        Watch(root, at, power_fails)
        work()

    result = exit_code_of(watched)
    assert result in (0, -signal.SIGKILL), f"the process that was to crash at operation {at} ended with {result}"
    return result != 0


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """Its fsync costs nothing, where there is such memory."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def intact(root: Path) -> list[int]:
    """Steps of the checkpoints that hold, after what a process does at its start."""
    checkpoints = root / "x" / "checkpoints"
    checkpoint.tidy(checkpoints)
    found = checkpoint.all_checkpoints(checkpoints)
    return [checkpoint.step_of(folder) or 0 for folder in found if checkpoint.fault(folder) is None]


@pytest.mark.parametrize("power_fails", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize("epochs", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_survives_a_crash_before_every_file_operation(tmp_path, epochs, power_fails):
    finish(tmp_path, epochs)
    for at in itertools.count(1):
        with folder_in_memory() as root:
            work = partial(stop_in_evaluation_then_finish, root, epochs)
            crashed = crashes(work, root, at, power_fails=power_fails)
            assert intact(root) or not (root / "committed").exists(), f"no checkpoint is left at operation {at}"
            if crashed:
                finish(root, epochs)
            same_run(tmp_path / "x", root / "x")
            assert names_in(root / "x") == names_in(tmp_path / "x")
            assert json.loads((root / "x" / "status.json").read_text())["state"] == "done"
        if not crashed:
            break
    assert at > 70, "the operations were not seen"


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_files_are_durable_before_a_checkpoint_appears_and_its_folder_before_another_goes(tmp_path, monkeypatch):
    durable, calls = set(), []
    fsync, rename = os.fsync, os.rename
    checkpoints = tmp_path / "x" / "checkpoints"

    def noted_fsync(descriptor):
        fsync(descriptor)
        durable.add(version(descriptor))
        if os.path.sameopenfile(descriptor, parent):
            calls.append("fsync")

    def noted_rename(source, target):
        calls.append("appears" if checkpoint.step_of(Path(target)) is not None else "goes")
        if calls[-1] == "appears":
            assert {path.name for path in source.iterdir()} == {
                "config.json", "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.bin", "state.json",
            }  # fmt: skip
            lost = [path.name for path in [source, *source.iterdir()] if version(path) not in durable]
            assert not lost, f"{lost} may be lost with the power"
        rename(source, target)

    checkpoints.mkdir(parents=True)
    parent = os.open(checkpoints, os.O_RDONLY)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    stop_in_evaluation_then_finish(tmp_path, epochs=2)
    os.close(parent)
    save, in_its_place = ["appears", "fsync"], ["goes", "appears", "fsync"]
    prune = ["goes"]
    assert calls == [*save, *save, *prune, *in_its_place, *save, *save, *prune]


class Retention:
    """Which checkpoints there are to be: the newest, and those of the best evaluations until then."""

    def __init__(self, losses: dict[int, float], keep_best: int):
        self.losses, self.keep_best = losses, keep_best
        self.steps: set[int] = set()

    def train(self, step: int, until: int, keep_last: int) -> None:
        for now in range(step + 1, until + 1):
            if now % SAVE_EVERY == 0 or now % STEPS == 0 or now == until:
                seen = sorted((loss, each) for each, loss in self.losses.items() if each <= now)
                newest = sorted(self.steps | {now})[-keep_last:]
                self.steps = {*newest, *((self.steps | {now}) & {each for _, each in seen[: self.keep_best]})}


session = st.tuples(st.just("train"), st.integers(1, 5), st.integers(1, 3))  # steps, keep_last
crash = st.tuples(st.just("crash"), st.integers(1, 90), st.booleans())  # operation, power_fails
damage = st.tuples(st.just("damage"), st.sampled_from(["model.safetensors", "state.json", "manifest.json"]), st.just(0))


def survives(operations: list[tuple[str, Any, Any]], keep_best: int) -> None:
    """Any series of sessions, crashes and damages keeps what retention says, and ends as if undisturbed."""
    options = {"epochs": EPOCHS, "monitor": "loss", "keep_best": keep_best}
    with folder_in_memory() as root:
        run_of(root, experiment_name="whole", **options).train()
        losses = {line["step"]: line["loss"] for line in lines_of(root / "whole", "val")}
        kept = Retention(losses, keep_best)
        checkpoints = root / "x" / "checkpoints"
        for number, (operation, value, other) in enumerate([*operations, ("train", STEPS * EPOCHS, 1)]):
            before, step = set(kept.steps), max(kept.steps, default=0)
            if operation == "damage":
                if len(before) > 1:
                    with (checkpoints / f"step_{step:08d}" / value).open("r+b") as file:
                        file.write(b"\0")
                    kept.steps.remove(step)
            elif operation == "crash":
                crashes(lambda: run_of(root, **options).train(), root, value, power_fails=other)
                kept.steps = set(intact(root))
                assert bool(before) <= bool(kept.steps), f"operation {number} left no checkpoint"
                assert max(kept.steps, default=0) >= step
            else:
                result = run_of(root, stop_after_steps=value, **options | {"keep_last": other}).train()
                kept.train(step, min(step + value, STEPS * EPOCHS), other)
                assert result["step"] == max(kept.steps)
                assert set(intact(root)) == kept.steps, f"operation {number}"
            if max(kept.steps, default=0) == STEPS * EPOCHS:
                break
        run_of(root, **options).train()
        same_run(root / "whole", root / "x")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.one_of(session, crash, damage), min_size=3, max_size=8), st.integers(0, 2))
def test_any_series_of_sessions_crashes_and_damages_keeps_what_it_should(operations, keep_best):
    survives(operations, keep_best)


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(session, crash, damage), min_size=3, max_size=12), st.integers(0, 2))
def test_three_hundred_series_keep_what_they_should(operations, keep_best):
    survives(operations, keep_best)
