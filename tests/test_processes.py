"""Two real processes: what one of them meets, both answer; an error of one is told once, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from configs.errors import UserError
from scripts.report import told
from tests.conftest import FSDP, ROOT
from trainer import processes

# A fault from outside: a script that changes one process of the real command, and then is that command.
DRIVER = """
import atexit, os, sys
sys.path.insert(0, {root!r})
import torch
from data.batches import ImageDataset
from trainer.main_trainer import MainTrainer
from trainer.saving import Saver

place, rank = sys.argv.pop(1), sys.argv.pop(1)

def boom(*_, **__):
    raise ValueError("boom")

def at_step_20(method, act):
    def changed(self, *given):
        result = method(self, *given)
        return act(result) if self.state.step == 20 else result
    return changed

if os.environ.get("FSDP_ON_CPU"):
    from tests.bn_net import let_fsdp_be_on_cpu
    let_fsdp_be_on_cpu()
if place == "reductions":
    from accelerate import Accelerator
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    prepare, train, leave = Accelerator.prepare, MainTrainer.train, MainTrainer.leave
    seen = []
    def counted(group, bucket):
        seen.append((bucket.is_last(), *map(id, bucket.parameters())))
        return allreduce_hook(group, bucket)
    def prepared(self, *given):
        model, *others = prepare(self, *given)
        model.register_comm_hook(None, counted)
        return model, *others
    def told(self, *why):
        print("gradients met", sum(last for last, *_ in seen), "times, each bucket", set(map(seen.count, seen)))
        return leave(self, *why)
    Accelerator.prepare, MainTrainer.leave = prepared, told
    MainTrainer.train = lambda self: (seen.clear(), train(self))[1]
if place == "parts":
    from models.simple_cnn import SimpleCNN
    seen, optimize, leave, forward = set(), MainTrainer.optimize, MainTrainer.leave, SimpleCNN.forward
    def watched(self, losses):
        optimize(self, losses)
        if not self.window.is_last:
            seen.update(type(weight.grad).__name__ for weight in self.parameters)
    def in_precision(self, *given):
        if torch.is_autocast_enabled("cpu"):
            seen.add("cached" if torch.is_autocast_cache_enabled() else "not cached")
        return forward(self, *given)
    MainTrainer.optimize, SimpleCNN.forward = watched, in_precision
    MainTrainer.leave = lambda self, *why: (print("seen", sorted(seen)), leave(self, *why))[1]
if place == "unused":
    from models.simple_cnn import SimpleCNN
    SimpleCNN.init_weights = lambda self: self.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
if os.environ["RANK"] == rank:
    if place == "forward":
        MainTrainer.forward_pass = at_step_20(MainTrainer.forward_pass, boom)
    elif place == "nan":
        MainTrainer.forward_pass = at_step_20(MainTrainer.forward_pass, lambda both: (both[0] * torch.nan, both[1]))
    elif place == "inf":  # in the loss alone: its gradients are finite
        MainTrainer.forward_pass = at_step_20(MainTrainer.forward_pass, lambda both: (both[0] + torch.inf, both[1]))
    elif place == "val":
        MainTrainer.validate_epoch = boom
    elif place == "save":
        Saver.write_ours = boom
    elif place == "data":
        ImageDataset.labels = boom
    elif place == "end":
        atexit.register(os.abort)

from scripts.train import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def train_two(
    folder: Path, place: str, rank: int, *flags: str, sharded: bool = False
) -> subprocess.CompletedProcess[str]:
    script = folder / "driver.py"
    script.write_text(DRIVER.format(root=str(ROOT)))
    run = ["--output_dir", str(folder), "--experiment_name", "x", "--epochs", "1", *flags]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= FSDP if sharded else {}
    return subprocess.run(
        [*command, str(script), place, str(rank), *run],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def ours(stderr: str) -> list[str]:
    """The lines that the processes wrote, not those of the launcher."""
    before = stderr.split("torch/distributed/elastic/multiprocessing/api.py")[0].splitlines()
    return [line for line in before if line.strip() and not line.startswith("W") and "Gloo" not in line]


@pytest.mark.parametrize(
    ("place", "rank", "words"),
    [
        ("forward", 1, ["ValueError: boom", "after step 20 of the run, samples "]),
        pytest.param("forward", 0, ["ValueError: boom", "samples "], marks=pytest.mark.long),
        pytest.param("val", 1, ["ValueError: boom", "after step 44"], marks=pytest.mark.long),
        pytest.param("save", 0, ["ValueError: boom"], marks=pytest.mark.long),
        pytest.param("data", 1, ["ValueError: boom", "data/", "one of the samples "], marks=pytest.mark.long),
    ],
)
def test_an_error_of_one_process_ends_both_and_is_told_once(tmp_path, place, rank, words):
    done = train_two(tmp_path, place, rank, "--num_workers", "1")
    said = ours(done.stderr)
    assert done.returncode == 1
    assert sum("ValueError: boom" in line for line in said) == 1
    for word in words:
        assert any(word in line for line in said), done.stderr
    assert not any("Traceback" in line for line in said)
    assert len(said) <= 15
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_gradients_meet_once_a_step_in_an_order_that_no_step_changes(tmp_path):
    """However many micro-batches a step has; DDP would make its buckets anew after the first step."""
    done = train_two(tmp_path, "reductions", 0, "--max_steps", "5", "--batch_size", "32", "--micro_batch_size", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gradients met 5 times, each bucket {5}") == 2


def test_a_sharded_model_keeps_nothing_whole_between_micro_batches(tmp_path):
    """Neither gradients nor, after the forward, weights in another precision."""
    flags = "--max_steps 2 --batch_size 32 --micro_batch_size 8 --mixed_precision bf16".split()
    done = train_two(tmp_path, "parts", 0, *flags, sharded=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seen ['DTensor', 'not cached']") == 2


def test_a_parameter_that_takes_no_part_is_told_or_left_out(tmp_path):
    done = train_two(tmp_path, "unused", 0, "--max_steps", "4")
    assert done.returncode == 1
    assert any("some parameters took no part in the step before" in line for line in ours(done.stderr)), done.stderr
    assert any("--find_unused_parameters" in line for line in ours(done.stderr))
    done = train_two(tmp_path, "unused", 0, "--max_steps", "4", "--find_unused_parameters")
    assert done.returncode == 0, done.stderr
    assert "did not find any unused parameters" not in done.stderr


def test_processes_that_know_each_other_do_not_go_through_the_interpreters_end(tmp_path):
    """There gloo's threads may meet Python half gone: a good run was seen to end by SIGABRT."""
    done = train_two(tmp_path, "end", 1, "--max_steps", "2", "--num_workers", "1")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("place", "rank", "sharded"),
    [("inf", 1, False), ("nan", 0, True), pytest.param("nan", 0, False, marks=pytest.mark.long)],
)
def test_a_loss_that_is_not_finite_on_one_process_stops_both_at_its_step(tmp_path, place, rank, sharded):
    done = train_two(tmp_path, place, rank, sharded=sharded)
    assert "step 21 " in done.stderr
    status = json.loads((tmp_path / "x" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("diverged", 21)
    assert sum(line.startswith(("error", "[process")) for line in ours(done.stderr)) == 1


def test_what_the_main_process_raises_the_others_raise_without_doing_its_work(monkeypatch):
    fault = UserError("the disk is full")
    monkeypatch.setattr(dist, "broadcast_object_list", lambda said, **_: said.__setitem__(1, fault))
    other = processes.Processes.__new__(processes.Processes)
    other.number, other.accelerator, other.patient = 2, SimpleNamespace(is_main_process=False), None
    with pytest.raises(UserError, match="the disk is full"):
        other.from_main(lambda: pytest.fail("this is the main process's work"))


WAITS = """
import os, sys, time
from types import SimpleNamespace
import torch.distributed as dist
from trainer import signals
from trainer.processes import Processes
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
processes = Processes(SimpleNamespace(num_processes=2, is_main_process=rank == 0))
with signals.noted():
    print("begun", flush=True)
    with processes.main_first():
        time.sleep(120)
"""


def test_a_process_that_waits_for_the_main_one_ends_by_a_signal(tmp_path):
    main, other = (
        subprocess.Popen(
            [sys.executable, "-c", WAITS, str(tmp_path / "store")],
            cwd=ROOT, env=os.environ | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        ) for rank in (0, 1)
    )  # fmt: skip
    try:
        assert all(process.stdout.readline() == "begun\n" for process in (main, other))
        time.sleep(0.5)
        other.send_signal(signal.SIGTERM)
        assert other.wait(timeout=20) == -signal.SIGTERM
    finally:
        for process in (main, other):
            process.kill()
            process.communicate()


def test_a_process_that_met_an_error_waits_for_no_thread():
    """Its end is what the others notice; a library's thread must not put it off."""
    code = """
import sys, threading, time
from scripts import session, train
threading.Thread(target=time.sleep, args=(60,)).start()
def boom(config): raise ValueError("boom")
session.run = boom
sys.exit(train.main([]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ValueError: boom")


def test_the_end_of_another_process_is_no_error_of_this_one():
    error = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:29500")
    assert told(error).what == "this process stops, since another one has ended"
    assert told(RuntimeError("boom")).what == "RuntimeError: boom"
