"""How many processes and micro-batches compute a step changes nothing: the reference is one process.

Whole runs are compared in float64: in float32 last bits grow from step to step, whatever the framework.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import BaseModel
from tests import bn_net  # noqa: F401 adds its model
from tests.conftest import FSDP, ROOT, lines_of, same_run
from trainer import checkpoint

# learning rate, averages, clipping, mixing and augmentation at work; plain gradient descent hides no scale
OPTIONS = (
    "--batch_size 32 --optimizer sgd --lr 0.05 --warmup_steps 5 --grad_clip 2 --ema_decay 0.9 --mixup 0.2 --cutmix 1 "
    "--augment trivialaugment --cpu_threads 1 --log_every 10 --trace_samples"
).split()
ANY_CUT = ["--model", "simple_cnn", "--dropout", "0"]  # nothing in it depends on what is computed at once
WHOLE = "--dtype float64 --max_steps 200 --save_every_steps 90".split()
BATCH_NORM = ["--model", "bn_net", "--dropout", "0.2", "--micro_batch_size", "8"]


def train(folder: Path, name: str, *flags: str, processes: int = 1, sharded: bool = False) -> Path:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    command = [sys.executable, *(launcher if processes > 1 else []), "tests/bn_net.py", *OPTIONS, *flags]
    done = subprocess.run(
        [*command, "--output_dir", str(folder), "--experiment_name", name, "--expect_processes", str(processes)],
        cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (FSDP if sharded else {}),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode in (0, 1 if processes > 1 else 75), done.stderr  # a launcher tells a stop by 1
    assert json.loads((folder / name / "status.json").read_text())["state"] in ("done", "preempted"), done.stderr
    assert ("sharded by FSDP2" in done.stdout) == sharded
    return folder / name


def of_step(checkpoints: Path, step: int | None) -> Path:
    return checkpoints / f"step_{step:08d}" if step else checkpoint.all_checkpoints(checkpoints)[-1]


def apart(one: Path, other: Path, file: str, step: int | None = None) -> float:
    """The norm of the difference of all tensors, relative to their norm; of the last checkpoints, or of a step's."""
    first, second = (
        torch.cat([t.double().flatten() for _, t in sorted(load_file(newest / file).items())])
        for newest in (of_step(run / "checkpoints", step) for run in (one, other))
    )
    return float((first - second).norm() / first.norm())


def check_alike(one: Path, other: Path, within: float) -> None:
    assert apart(one, other, "model.safetensors") <= within
    assert apart(one, other, "ema.safetensors") <= within
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    first, second = lines_of(one), lines_of(other)
    assert len(first) == len(second) > 1
    for line, same in zip(first, second):
        assert line.pop("kind") == same.pop("kind")
        assert line == pytest.approx(same, rel=within, abs=within)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scale")


@pytest.fixture(scope="module")
def batch_norm(folder) -> Path:
    return train(folder, "batch_norm", *BATCH_NORM, *WHOLE)


@pytest.fixture(scope="module")
def any_cut(folder) -> Path:
    return train(folder, "any_cut", *ANY_CUT, *WHOLE)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_at_one_micro_batch_size_the_processes_change_nothing(folder, batch_norm, processes):
    """With dropout, MixUp, CutMix and BatchNorm."""
    check_alike(batch_norm, train(folder, f"batch_norm_{processes}", *BATCH_NORM, *WHOLE, processes=processes), 1e-9)


@pytest.mark.long
def test_sharded_weights_change_nothing(folder, batch_norm):
    """Nor what is saved: files of whole weights, which one process loads."""
    sharded = train(folder, "sharded", *BATCH_NORM, *WHOLE, processes=2, sharded=True)
    check_alike(batch_norm, sharded, 1e-9)
    one, other = (BaseModel.from_pretrained(run / "best") for run in (batch_norm, sharded))
    assert one.config() == other.config()
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    names = [sorted(path.name for path in run.rglob("*") if path.is_file()) for run in (batch_norm, sharded)]
    assert names[0] == names[1]


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True])
def test_a_mean_of_epochs_and_a_teacher_change_with_no_number_of_processes(folder, any_cut, sharded):
    """Two epochs of 44 steps, and one that is cut off; BatchNorm's statistics of the mean are measured by all."""
    averaged = "--max_steps 100 --ema_decay 0 --swa_start_epoch 0 --swa_lr 0.02".split()
    flags = [*BATCH_NORM, *WHOLE, *averaged, "--teacher", str(any_cut), "--distill_weight", "0.7"]
    one = folder / "taught" if (folder / "taught").exists() else train(folder, "taught", *flags)
    check_alike(one, train(folder, f"taught_2_{sharded}", *flags, processes=2, sharded=sharded), 1e-9)


@pytest.mark.long
@pytest.mark.parametrize("model", ["swin_t", "vit_b_16", "convnext_tiny", "regnet_y_400mf"])
def test_models_of_torchvision_are_sharded_block_by_block(folder, model):
    """Also those whose layers are used past their forward, as in Swin's attention."""
    flags = [
        "--model",
        model,
        *"--max_steps 2 --warmup_steps 0 --batch_size 4 --micro_batch_size 2 --image_size 32".split(),
    ]
    one, other = train(folder, model, *flags), train(folder, f"{model}_2", *flags, processes=2, sharded=True)
    (line,), (same,) = lines_of(one, "epoch"), lines_of(other, "epoch")
    assert line["loss"] == pytest.approx(same["loss"], rel=1e-2)


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.long)])
def test_a_sharded_run_goes_on_unsharded_and_back(folder, optimizer):
    """One process, then 2 that are sharded, then 1; with AdamW also 2 that are not sharded, and sharded again."""
    flags = [*BATCH_NORM, *"--dtype float64 --max_steps 80 --optimizer".split(), optimizer]
    whole = train(folder, f"whole_{optimizer}", *flags)
    more = [(10, 2, False), (10, 2, True), (10, 2, True)] if optimizer == "adamw" else []
    for steps, processes, sharded in [(20, 1, False), (20, 2, True), *more, (0, 1, False)]:
        stop = ["--stop_after_steps", str(steps)] if steps else []
        run = train(folder, f"parts_{optimizer}", *flags, *stop, processes=processes, sharded=sharded)
    check_alike(whole, run, 1e-9)


@pytest.mark.parametrize(
    ("processes", "micro"),
    [(2, 4), *(pytest.param(*cut, marks=pytest.mark.long) for cut in [(1, 8), (2, 16), (4, 8)])],
)
def test_a_model_without_batch_statistics_and_dropout_may_be_cut_anyhow(folder, any_cut, processes, micro):
    """1x8x4, 2x4x4, 2x16 and 4x8 against 1x32 (processes x micro-batch x accumulation)."""
    flags = [*ANY_CUT, *WHOLE, "--micro_batch_size", str(micro)]
    check_alike(any_cut, train(folder, f"any_cut_{processes}x{micro}", *flags, processes=processes), 1e-9)


@pytest.mark.parametrize(("processes", "micro"), [(2, 4), pytest.param(4, 8, marks=pytest.mark.long)])
def test_a_step_in_float32_is_the_same_to_its_last_digits(folder, processes, micro):
    """Later ones drift apart from there; the first three losses show nothing of it yet."""
    flags = [*ANY_CUT, *"--max_steps 3 --warmup_steps 0 --log_every 1 --save_every_steps 1 --keep_last 3".split()]
    one = train(folder, f"step_{processes}", *flags)
    other = train(folder, f"step_{processes}x{micro}", *flags, "--micro_batch_size", str(micro), processes=processes)
    assert 0 < apart(one, other, "model.safetensors", step=1) <= 1e-6
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    losses, others = ([line["loss"] for line in lines_of(run, "train")] for run in (one, other))
    assert len(losses) == 3 and others == pytest.approx(losses, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, "--split 0.95 0.0017 0.0483"),
        (4, "--split 0.95 0.0017 0.0483"),
        (4, "--split 0.8 0.021 0.179 --micro_batch_size 6"),
        (2, "--streaming --split 0.8 0.021 0.179 --micro_batch_size 6"),
        (4, "--streaming --split 0.95 0.0017 0.0483"),
    ],
)
def test_an_evaluation_counts_each_sample_once(folder, processes, flags):
    """One sample for all processes, or so many that they cannot share them evenly."""
    name = "".join(filter(str.isalnum, flags))
    both = [*ANY_CUT, *"--dtype float64 --max_steps 2 --warmup_steps 0".split(), *flags.split()]
    one = folder / name if (folder / name).exists() else train(folder, name, *both)
    other = train(folder, f"{name}_{processes}", *both, processes=processes)
    (line,), (same,) = lines_of(one, "val"), lines_of(other, "val")
    assert line["accuracy"] == same["accuracy"]
    assert line.pop("kind") == same.pop("kind")
    assert line == pytest.approx(same, rel=1e-6)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_all_processes_stop_early_and_slow_down_where_one_does(folder, processes):
    """By an evaluation that they share unevenly: 37 samples."""
    flags = [*ANY_CUT, *"--dtype float64 --epochs 12 --split 0.18 0.021 0.799 --monitor loss --min_delta 0.03".split()]
    flags += "--lr 0.2 --scheduler plateau --decay_epochs 1 --early_stopping --patience 2".split()
    one = folder / "early" if (folder / "early").exists() else train(folder, "early", *flags)
    check_alike(one, train(folder, f"early_{processes}", *flags, processes=processes), 1e-9)
    assert lines_of(one, "val")[1]["loss"] < lines_of(one, "val")[0]["loss"] - 0.03  # so that a wrong value is seen
    assert 3 < len(lines_of(one, "val")) < 12
    assert len({line["lr"] for line in lines_of(one, "train") if line["step"] > 5}) > 1


@pytest.mark.parametrize("course", [(1, 2, 1), pytest.param((1, 2, 4, 1), marks=pytest.mark.long)])
def test_a_run_goes_on_with_another_number_of_processes(folder, batch_norm, course):
    name = "course_" + "_".join(map(str, course))
    for number, processes in enumerate(course):
        stop = ["--stop_after_steps", "60"] if number < len(course) - 1 else []
        run = train(folder, name, *BATCH_NORM, *WHOLE, *stop, processes=processes)
        assert checkpoint.read_state(checkpoint.all_checkpoints(run / "checkpoints")[-1])["processes"] == processes
    check_alike(batch_norm, run, 1e-9)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "sharded"), [(3, False), (4, False), (3, True)])
def test_the_same_number_of_processes_resumes_to_the_last_bit(folder, processes, sharded):
    """In float32, where three processes or more add up gradients in an order that has to be the same again."""
    name = f"bits_{processes}_{sharded}"
    flags = [*BATCH_NORM, "--batch_size", "48", "--max_steps", "20", "--save_every_steps", "7"]
    whole = train(folder, f"{name}_whole", *flags, processes=processes, sharded=sharded)
    for stop in (["--stop_after_steps", "6"], ["--stop_after_steps", "8"], []):
        run = train(folder, name, *flags, *stop, processes=processes, sharded=sharded)
    same_run(whole, run)
