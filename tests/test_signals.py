"""Signals are noted by a handler and answered between two steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, lines_of
from tests.tiny import tiny_batches, tiny_trainer, weights
from trainer import signals
from trainer.main_trainer import MainTrainer


def signalled(when: str, number: int) -> type[MainTrainer]:
    """A trainer whose process gets a signal in its seventh step, evaluation or save."""

    class Signalled(MainTrainer):
        sent = False

        def send(self, where: str) -> None:
            if where == when and self.state.step >= 7 and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)

        def forward_pass(self, batch: Any) -> Any:
            self.send("step" if self.model.training else "evaluation")
            return super().forward_pass(batch)

        def save_checkpoint(self, *, regular: bool = True) -> None:
            self.send("save")
            super().save_checkpoint(regular=regular)

    return Signalled


@pytest.mark.parametrize("when", ["step", "evaluation", "save"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_got_a_signal_goes_on_as_if_nothing_had_been(tmp_path, when, number):
    batches, val = tiny_batches([4] * 5), tiny_batches([4] * 3, seed=1)
    options: dict[str, Any] = {"batch_size": 4, "epochs": 4, "ema_decay": 0.9, "log_every": 3, "save_every_steps": 2}
    whole = tiny_trainer(tmp_path, batches, val, experiment_name="whole", **options)
    whole.train()
    before = signal.getsignal(number)
    part = tiny_trainer(tmp_path, batches, val, trainer=signalled(when, number), experiment_name="part", **options)
    result = part.train()
    assert (result["state"], result["reason"]) == ("preempted", signal.Signals(number).name)
    assert part.state.step == {"step": 8, "evaluation": 10, "save": 9}[when]
    assert json.loads((part.run.path / "status.json").read_text()) == result
    assert signal.getsignal(number) is before
    back = tiny_trainer(tmp_path, batches, val, experiment_name="part", **options)
    assert back.state.step == part.state.step
    assert back.train()["state"] == "done"
    assert torch.equal(weights(back), weights(whole))
    assert all(torch.equal(back.ema.average[name], value) for name, value in whole.ema.average.items())
    assert lines_of(back.run.path) == lines_of(whole.run.path)


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_a_run_outlives_what_reads_its_output(tmp_path, number):
    """As when Ctrl-C ends `tee` as well."""
    flags = ["--output_dir", tmp_path, "--experiment_name", "x", "--max_steps", "20" if number is None else "20000"]
    run = subprocess.Popen(
        [sys.executable, "scripts/train.py", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert run.stdout.readline()
    run.stdout.close()
    while number and not (tmp_path / "x" / "metrics.jsonl").exists():
        assert run.poll() is None
        time.sleep(0.05)
    if number:
        run.send_signal(number)
    assert run.wait(180) == (75 if number else 0)
    status = json.loads((tmp_path / "x" / "status.json").read_text())
    assert status["state"] == ("preempted" if number else "done")


def test_a_loader_whose_parent_was_killed_before_it_began_ends():
    code = "import os, time; from data.loader import outlive_a_signal as o; o(os.getpid(), True, 0); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50, check=False)
    assert done.returncode == 0  # its parent is not the process that was named


def test_training_works_in_a_thread(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_batches([4] * 3), batch_size=4)
    results: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: results.append(trainer.train()))
    thread.start()
    thread.join()
    assert results[0]["state"] == "done"


def test_a_second_signal_changes_nothing():
    with signals.noted():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop_reason() == "SIGUSR1"
        with signals.noted():  # of the trainer, inside that of the script
            assert signals.stop_reason() == "SIGUSR1"
        assert signals.stop_reason() == "SIGUSR1"
    assert signals.stop_reason() is None


def test_before_training_a_signal_stops_at_once():
    with signals.noted():
        with pytest.raises(signals.Preempted, match="SIGTERM"), signals.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal was only noted")
        with pytest.raises(signals.Preempted, match="SIGTERM"), signals.at_once():
            pytest.fail("a signal that came before was forgotten")


def test_only_a_launcher_must_not_be_outlived():
    code = "import os; from trainer.signals import launcher_of; print(launcher_of(os.getppid()) is not None)"
    for name, launcher in (("torchrun", "True"), ("accelerate", "True"), ("train", "False")):
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
        said = subprocess.run(
            [sys.executable, "-c", parent, name], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert said.strip() == launcher, name


def test_signals_are_noted_before_torch_is_imported():
    """A module that stands in for torch sends the signal while it is imported."""
    code = (
        "import sys, os, signal; from trainer import signals\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGTERM); sys.meta_path.remove(self)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from scripts.train import main\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(main(['--output_dir', '/nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGTERM before training" in done.stderr
    assert "Traceback" not in done.stderr
