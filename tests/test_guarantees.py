"""What every trainer promises, tried on each trainer: the cells of the README's table.

`shown` is what a cell tells there; tests/guarantees.py makes the table.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.loader import train_loader
from scripts.wiring import build_data
from tests.conftest import ROOT, exit_code_of, lines_of, run_script, same_run
from tests.tasks import NAMES, Task, config_of, prepared, save_pictures, task_of
from tests.test_scale import apart, check_alike
from trainer.base_trainer import BaseTrainer

# 6 steps an epoch, averaging, clipping, accumulation at work; the last epoch is the second, which draws anew
COMPARED = "--split 0.4 0.2 0.4 --epochs 2 --ema_decay 0.9 --grad_clip 2 --trace_samples"
FLOAT64 = "--dtype float64 --optimizer sgd --lr 0.05"  # plain gradient descent hides no scale
# evaluations decide the learning rate of the third epoch, and that there is no fourth
LISTENING = "--epochs 4 --scheduler plateau --decay_epochs 1 --early_stopping --patience 2 --min_delta 100"

Name = tuple[str, str]


@pytest.fixture(params=NAMES, ids="-".join)
def name(request) -> Name:
    """A trainer and the kind of its labels."""
    return request.param


@pytest.fixture
def task(name) -> Task:
    return task_of(*name)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures") / "train.parquet")


def test_trains(name, task, pictures, tmp_path, record_property):
    """It tells pictures that it has not seen."""
    flags = "--split 0.8 0.2 0 --epochs 8 --augment none --micro_batch_size 16"
    trained = prepared(name, pictures, tmp_path / "x", flags)
    assert trained.train()["state"] == "done"
    found = lines_of(trained.run.path, "val")[-1][task.metric]
    record_property("shown", f"{task.metric} {found:.2f}")
    assert found >= task.trained


def test_overfits_one_batch(name, task, pictures, tmp_path, record_property):
    batch_of_8 = "--batch_size 8 --micro_batch_size 8"
    course = "--epochs 4 --augment none --warmup_steps 0"
    source = prepared(name, pictures, tmp_path / "x", "--split 0.8 0.2 0", batch_of_8, course)
    batch = next(iter(source.train_loader))
    learnt = type(source)(source.config, source.plain_model, [batch] * 20, [batch])
    learnt.train()
    found = lines_of(learnt.run.path, "val")[-1][task.metric]
    record_property("shown", f"{task.metric} {found:.2f}")
    assert found >= task.by_heart


def kill_at(step: int, trainer: BaseTrainer) -> None:
    """Train to this step, and end there as after `kill -9`, when what was being saved has been saved."""
    after_step = trainer.after_step

    def killed(bar: Any) -> bool:
        if trainer.state.step == step:
            trainer.saver.finish()
            os.kill(os.getpid(), signal.SIGKILL)
        return after_step(bar)

    trainer.after_step = killed
    trainer.train()


def test_resumes_bit_identically(name, task, pictures, tmp_path, record_property):
    """Killed in the middle of the second epoch, and continued by the real command in a fresh process."""
    flags = [COMPARED, "--save_every_steps 4", task.more]
    prepared(name, pictures, tmp_path / "whole", *flags).train()
    killed = tmp_path / "killed"
    assert exit_code_of(lambda: kill_at(10, prepared(name, pictures, killed, *flags))) == -signal.SIGKILL
    assert "after step 8 (epoch 2)" in run_script("train.py", "--resume", killed).stdout
    same_run(tmp_path / "whole", killed)
    record_property("shown", "yes")


@pytest.fixture(scope="module")
def of_two_processes(pictures, tmp_path_factory) -> tuple[Path, str]:
    """A folder with a run of each trainer, and what was said of them. One command for all: starting takes longest."""
    folder = tmp_path_factory.mktemp("two")
    command = [*"-m torch.distributed.run --standalone --nproc_per_node 2 tests/tasks.py".split(), pictures, folder]
    done = subprocess.run(
        [sys.executable, *map(str, command), *f"{COMPARED} {FLOAT64} {LISTENING}".split()], cwd=ROOT, text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
        check=False,
    )  # fmt: skip
    return folder, done.stderr[-3000:]


def test_2_processes_equal_1(name, task, pictures, of_two_processes, tmp_path, record_property):
    """In float64: weights, their averages, samples, all that is logged, and when it is enough."""
    folder, said = of_two_processes
    two = folder / "-".join(name)
    assert (two / "best").is_dir(), said
    one = prepared(name, pictures, tmp_path / "one", COMPARED, FLOAT64, LISTENING, task.more)
    one.train()
    difference = apart(one.run.path, two, "model.safetensors")
    record_property("shown", f"{difference:.0e}" if difference else "to the last bit")
    assert difference <= 1e-9
    check_alike(one.run.path, two, 1e-9)
    assert one.state.step == 18 and one.finished
    assert '"processes": 2' in (two / "env.json").read_text()


def epoch(name: Name, pictures: Path, *flags: str, process: int = 0, processes: int = 1) -> dict[int, dict[str, Any]]:
    """The samples of a training epoch by their ids, in their order."""
    whole = "--split 1 0 0 --batch_size 8 --micro_batch_size 1 --shuffle_buffer 80"
    config, data, _ = build_data(config_of(name, pictures, whole, *flags))
    batches = list(train_loader(config, data, process, processes))
    return {int(one.pop("ids")): {key: np.asarray(values) for key, values in one.items()} for one in batches}


def test_streams(name, task, pictures, tmp_path, record_property):
    """From parquet: an epoch has each sample once, as it is when read whole; processes share it, and a run that was
    stopped in it goes on to the same end."""
    whole, streamed = epoch(name, pictures), epoch(name, pictures, "--streaming")
    assert sorted(streamed) == sorted(whole) == list(range(240)) != list(streamed)
    np.testing.assert_equal(streamed, whole)
    shares = [epoch(name, pictures, "--streaming", process=process, processes=2) for process in (0, 1)]
    steps = [list(share)[i : i + 4] for i in range(0, 120, 4) for share in shares]
    assert sum(steps, []) == list(streamed)

    flags = [COMPARED, "--streaming --shuffle_buffer 80"]
    prepared(name, pictures, tmp_path / "whole", *flags).train()
    for more in ("--stop_after_steps 9 --num_workers 1", "--num_workers 0"):
        prepared(name, pictures, tmp_path / "parts", *flags, more).train()
    same_run(tmp_path / "whole", tmp_path / "parts")
    record_property("shown", "yes")
