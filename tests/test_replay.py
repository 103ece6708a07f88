"""Any step of a run can be computed again, to the last bit, and the run folder stays as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.arguments import parse
from configs.errors import ConfigError, DataError, Diverged, UserError
from scripts.replaying import replay
from scripts.session import run as train_session
from tests.conftest import ROOT, lines_of, run_script

# whatever has or draws state: accumulation, dropout (of simple_cnn), augmentation, mixing, averaging, the schedule
OPTIONS = (
    "--epochs 3 --batch_size 96 --micro_batch_size 32 --augment trivialaugment --mixup 0.2 --cutmix 1 --ema_decay 0.9 "
    "--warmup_steps 5 --save_every_steps 5 --cpu_threads 1 --trace_samples"
).split()


def train(folder: Path, name: str, *flags: str) -> Path:
    train_session(parse(["--output_dir", str(folder), "--experiment_name", name, *flags]))
    return folder / name


def again(run: Path, step: int, *flags: str, processes: int | None = None) -> int:
    return replay(run, step, parse(["--config", str(run / "config.yaml"), *flags]), processes)


def value(said: str, name: str) -> float:
    return next(float(line.split()[1]) for line in said.splitlines() if line.startswith(name))


def content(run: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """42 steps; checkpoints of 40 and 42 are left. Every fourth step has a line."""
    return train(tmp_path_factory.mktemp("runs"), "a", *OPTIONS, "--log_every", "4")


@pytest.fixture(scope="module")
def reference(trained) -> dict[int, dict]:
    """The same run with a line for each step."""
    run = train(trained.parent, "each", *OPTIONS, "--log_every", "1")
    return {line["step"]: line for line in lines_of(run, "train")}


@pytest.mark.parametrize(
    ("step", "begun", "compared"),
    [
        (1, "from the beginning", "metrics.jsonl: equal"),
        (14, "from the beginning", "samples.jsonl: equal"),
        (24, "from the beginning", "metrics.jsonl, mean of steps 21 to 24: equal"),
        (41, "from the checkpoint of step 40", "samples.jsonl: equal"),
    ],
)
def test_a_step_is_computed_again_to_the_last_bit(trained, reference, capsys, step, begun, compared):
    before = content(trained)
    capsys.readouterr()
    assert again(trained, step) == 0
    said = capsys.readouterr().out
    assert begun in said
    assert compared in said
    assert [value(said, name) for name in ("loss", "grad_norm", "lr")] == [
        reference[step][name] for name in ("loss", "grad_norm", "lr")
    ]
    ids = json.loads((trained / "samples.jsonl").read_text().splitlines()[step - 1])["ids"]
    assert " ".join(said.split("samples   ")[1].split("compare")[0].split()) == ", ".join(map(str, ids))
    assert content(trained) == before


def test_a_replay_from_inside_a_window_ends_with_the_line_of_the_whole_window(tmp_path, capsys):
    run = train(tmp_path, "w", *OPTIONS, "--epochs", "2", "--log_every", "4", "--keep_last", "9")
    assert again(run, 28) == 0
    said = capsys.readouterr().out
    assert "from the checkpoint of step 25" in said
    assert "metrics.jsonl, mean of steps 25 to 28: equal to the last bit" in said
    assert again(run, 12) == 0
    said = capsys.readouterr().out
    assert "from the checkpoint of step 10" in said
    assert "metrics.jsonl, mean of steps 9 to 12: equal to the last bit" in said


def test_a_difference_is_told_with_both_values(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "changed"))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    was, first["loss"] = first["loss"], first["loss"] * (1 + 1e-7)
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]))
    capsys.readouterr()
    assert again(run, 1) == 1
    said = capsys.readouterr().out
    assert "metrics.jsonl: DIFFERENT" in said
    assert f"loss was {first['loss']!r}, now {was!r}" in said
    assert again(run, 1, "--seed", "1", "--no_trace_samples") == 1
    assert "samples.jsonl: DIFFERENT" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_passed_over(trained, tmp_path, reference, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "damaged"))
    with (run / "checkpoints" / "step_00000040" / "model.safetensors").open("ab") as file:
        file.write(b"0")
    capsys.readouterr()
    assert again(run, 41) == 0
    said = capsys.readouterr().out
    assert "step_00000040 is damaged and passed over" in said
    assert "from the beginning" in said
    assert value(said, "loss") == reference[41]["loss"]


def test_the_step_that_was_not_finite_is_met_again_by_the_real_command(tmp_path):
    flags = ["--output_dir", tmp_path, "--experiment_name", "x", "--lr", "1e30", "--optimizer", "sgd"]
    run_script("train.py", *flags, "--micro_batch_size", "16", rc=3)
    before = content(tmp_path / "x")
    done = run_script("replay.py", tmp_path / "x", "--step", "2")
    assert "loss      nan" in done.stdout
    assert "nonfinite/step_00000002.json: equal to the last bit" in done.stdout
    fault = " ".join(done.stdout.split("fault     ")[1].split("compare")[0].split())
    assert fault.startswith("loss is nan at step 2 (lr 9.99997e+29, samples 739,")
    assert fault.endswith("the run stopped by it, too")
    assert "Traceback" not in done.stderr
    assert content(tmp_path / "x") == before
    done = run_script("replay.py", tmp_path / "x", "--step", "3", rc=1)
    assert "the run has no step 3" in done.stderr
    assert "from 1 to 2" in done.stderr
    assert not list(tmp_path.glob(".*"))


def test_a_fault_that_does_not_come_again_is_a_difference(tmp_path, capsys):
    with pytest.raises(Diverged):
        train(tmp_path, "x", "--lr", "1e30", "--optimizer", "sgd", "--cpu_threads", "1")
    capsys.readouterr()
    assert again(tmp_path / "x", 2, "--lr", "0.01") == 1
    said = capsys.readouterr().out
    assert "nonfinite/step_00000002.json: DIFFERENT" in said
    assert "status.json: DIFFERENT" in said


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_steps_that_were_passed_over_are_passed_over_again(tmp_path, capsys, policy):
    flags = f"--lr 1e30 --optimizer sgd --cpu_threads 1 --nonfinite {policy} --log_every 5 --save_every_steps 4"
    with pytest.raises(Diverged, match="as 10 steps before"):
        train(tmp_path, "x", *flags.split())
    capsule = sorted((tmp_path / "x" / "nonfinite").iterdir())[3]
    number = int(capsule.stem.removeprefix("step_"))
    for step, compared in ((number, f"nonfinite/{capsule.name}"), (10, "metrics.jsonl, mean of steps 6 to 10")):
        capsys.readouterr()
        assert again(tmp_path / "x", step) == 0
        assert f"{compared}: equal to the last bit" in capsys.readouterr().out


def test_the_schedule_that_listens_to_evaluations_hears_them_again(tmp_path, capsys):
    flags = "--max_steps 150 --scheduler plateau --decay_epochs 1 --min_delta 1 --lr 0.01 --cpu_threads 1 --keep_last 1"
    run = train(tmp_path, "x", *flags.split(), "--keep_best", "0", "--log_every", "45")
    rates = {line["step"]: line["lr"] for line in lines_of(run, "train")}
    assert rates[135] < rates[90] < rates[1]
    capsys.readouterr()
    assert again(run, 135) == 0
    assert "metrics.jsonl, mean of steps 91 to 135: equal to the last bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "batch", [pytest.param("96", marks=pytest.mark.long), "66"]
)  # 66: each process cuts its 33 samples into 18 and 15
def test_one_process_computes_what_two_did(tmp_path, capsys, batch):
    flags = ["--output_dir", str(tmp_path), "--experiment_name", "two", "--batch_size", batch]
    flags += "--micro_batch_size 30 --max_steps 12 --log_every 1 --cpu_threads 1 --augment trivialaugment".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "scripts/train.py", *flags]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, check=True)
    assert again(tmp_path / "two", 11) == 0
    assert "metrics.jsonl: equal to the last bit" in capsys.readouterr().out
    assert again(tmp_path / "two", 11, processes=1) == 1  # as if one had computed it: other micro-batches
    train(tmp_path, "two", *flags, "--max_steps", "14")  # one goes on: step 11 is still one of two
    capsys.readouterr()
    assert again(tmp_path / "two", 11, "--max_steps", "12") == 0
    assert "the number of processes was" not in capsys.readouterr().err


def test_what_cannot_be_replayed_is_one_block(trained, tmp_path, image_folder, monkeypatch):
    for step in (0, 43):
        with pytest.raises(UserError, match=f"the run has no step {step}") as error:
            again(trained, step)
        assert "from 1 to 42" in str(error.value)
    done = run_script("replay.py", tmp_path / "nowhere", "--step", "1", rc=2)
    assert done.stderr.startswith("error: there is no run: no config.yaml")
    flags = f"--train_data_dir {image_folder} --max_steps 2 --batch_size 4 --split 0.5 0.5 0 --num_workers 0"
    run = train(tmp_path, "gone", *flags.split())
    image_folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no such folder of images"):
        again(run, 2)
    assert again(run, 2, "--train_data_dir", str(tmp_path / "elsewhere")) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        again(trained, 1)
