"""The commands, as users type them, in fresh processes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.arguments import make_config
from data.dataset import load_data
from data.transforms import Transform
from models import build
from scripts import train
from scripts.report import block
from scripts.session import cut, lines_of_the_cut, made_of_what_is_computed_at_once
from tests.conftest import ROOT, SHARED_DATA, lines_of, run_script
from tests.hub_server import TOKEN, HubServer

TINY = "--max_steps 3 --batch_size 8 --log_every 1 --cpu_threads 1".split()
RUN_TRAIN = "import sys; from scripts.train import main; sys.exit(main(sys.argv[1:]))"


def launch(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run, with every tracker on, by accelerate launch."""
    folder = tmp_path_factory.mktemp("scripts")
    launcher = str(Path(sys.executable).with_name("accelerate"))
    flags = ["--output_dir", str(folder), "--experiment_name", "r", "--use_tensorboard", "--use_wandb", "--epochs", "3"]
    done = launch(launcher, "launch", "scripts/train.py", *flags, WANDB_MODE="offline")
    (folder / "r" / "said.txt").write_text(done.stdout)
    return folder / "r"


def test_the_first_command_says_what_a_newcomer_needs(run):
    said = (run / "said.txt").read_text()
    for words in (
        "simple_cnn: 288,170 parameters",
        "train 1,438 · validation 180 · test 179",
        "dropout: the 32 images computed at once are part of the result",
        "samples/s  wait",
        "best      accuracy",
        f"run       {run}",
        f"scripts/test.py --weights {run}",
    ):
        assert words in said
    assert len(said.splitlines()[0]) < 100
    assert max(len(line) for line in said.splitlines() if re.match(r" +\d+ ", line)) <= 80
    assert "warning" not in said


def test_the_summary_names_what_depends_on_the_micro_batch():
    def named(name: str, **options) -> str:
        return made_of_what_is_computed_at_once(build(name, num_classes=2, image_size=32, **options))

    assert named("simple_cnn") == "dropout"
    assert named("simple_cnn", dropout=0.0) == ""
    assert named("resnet18") == "BatchNorm"
    assert named("efficientnet_b0", dropout=0.0) == "BatchNorm and dropout"  # stochastic depth
    assert named("convnext_tiny") == "dropout"


def test_the_run_folder_tells_what_happened(run):
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert json.loads((run / "env.json").read_text())["torch"]
    steps = [line["step"] for line in lines_of(run, "train")]
    assert steps == [1, *range(10, 133, 10)]
    assert [line["epoch"] for line in lines_of(run, "val")] == [0, 1, 2]
    for line in lines_of(run, "speed"):
        assert line["samples_per_second"] > 0
        assert 0 <= line["data_wait_share"] < 1
    last = lines_of(run, "val")[-1]
    assert set(last) == {"kind", "step", "epoch", "loss", "accuracy", "top5_accuracy", "f1"}
    assert last["accuracy"] > 0.8


def test_trackers_hold_the_metrics(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("val/accuracy")]
    assert found == [(line["step"], pytest.approx(line["accuracy"])) for line in lines_of(run, "val")]
    assert len(events.Scalars("train/loss")) == len(lines_of(run, "train"))
    (offline,) = (run / "wandb").glob("offline-run-*")
    content = b"".join(path.read_bytes() for path in offline.glob("*.wandb"))
    for words in (b"val/accuracy", b"batch_size", b"model.safetensors"):
        assert words in content, words


def test_a_tracker_that_fails_stops_nothing(tmp_path):
    (tmp_path / "wandb.py").write_text("def init(**_): raise OSError('no room for a tracker')\nclass Settings:\n"
                                       "    def __init__(self, **_): pass\n")  # fmt: skip
    flags = [*TINY, "--output_dir", tmp_path, "--experiment_name", "t", "--use_wandb"]
    said = run_script("train.py", *flags, env={"PYTHONPATH": str(tmp_path)}).stdout
    assert "warning: W&B stopped (OSError: no room for a tracker)" in said
    assert len(lines_of(tmp_path / "t", "train")) == 3


@pytest.mark.parametrize("weights", ["", "best", "best/model.safetensors", "checkpoints/step_00000132"])
def test_test_measures_a_run_a_folder_a_file_and_a_checkpoint(run, weights):
    said = run_script("test.py", "--weights", run / weights).stdout
    assert "test samples          179" in said
    line = lines_of(run, "test")[-1]
    assert line["accuracy"] > 0.8
    assert f"test accuracy         {line['accuracy']:.4f}" in said


def test_test_on_val_gives_what_training_saw(run):
    said = run_script("test.py", "--weights", run / "best", "--on", "val").stdout
    status = json.loads((run / "status.json").read_text())
    assert f"val accuracy         {status['best']['value']:.4f}" in said


def test_test_needs_nothing_but_the_model_and_the_data(run, tmp_path, image_folder):
    import shutil

    shutil.copytree(run / "best", tmp_path / "model")
    said = run_script("test.py", "--weights", "model", "--dataset", "digits", cwd=tmp_path).stdout
    assert "test accuracy" in said
    assert json.loads((tmp_path / "model" / "test_metrics.jsonl").read_text())["samples"] == 179
    done = run_script("test.py", "--weights", "model", "--test_data_dir", image_folder, cwd=tmp_path, rc=1)
    assert "class folder 'bright' is none of the 10 training classes" in done.stderr


def test_a_test_folder_is_searched_for_training_images(tmp_path, image_folder):
    flags = ["--train_data_dir", image_folder, "--epochs", "1", "--output_dir", tmp_path, "--experiment_name", "a"]
    run_script("train.py", *flags, "--batch_size", "4")
    done = run_script("test.py", "--weights", tmp_path / "a", "--test_data_dir", image_folder)
    assert "16 test images are exact copies of training images" in done.stdout


def test_predict_reads_files_and_folders_and_names_what_it_cannot_read(run, tmp_path):
    (tmp_path / "in" / "more").mkdir(parents=True)
    with np.load(ROOT / "data" / "digits.npz") as digits:
        for place in range(20):
            picture = Image.fromarray(np.round(digits["images"][place] * (255 / 16)).astype(np.uint8))
            picture.save(tmp_path / "in" / "more" / f"{place:02d}_{digits['labels'][place]}.png")
    (tmp_path / "in" / "broken.png").write_text("no picture")
    output = tmp_path / "out" / "p.csv"
    said = run_script("predict.py", "--weights", run, tmp_path / "in", "--output", output, "--batch_size", "7").stdout
    assert "20 predictions written" in said
    assert "1 files could not be read" in said
    rows = list(csv.DictReader(output.open()))
    assert rows[0]["path"].endswith("broken.png")
    assert "cannot" in rows[0]["error"]
    right = [Path(row["path"]).stem.split("_")[1] == row["label"] for row in rows[1:]]
    assert sum(right) >= 16
    lines = tmp_path / "p.jsonl"
    run_script("predict.py", "--weights", run / "best", rows[1]["path"], "--output", lines)
    assert json.loads(lines.read_text())["label"] == rows[1]["label"]
    done = run_script("predict.py", "--weights", tmp_path / "nothing", tmp_path / "in", rc=2)
    assert "does not exist" in done.stderr
    done = run_script("predict.py", "--weights", run, tmp_path / "in", "--draw", tmp_path / "drawn", rc=2)
    assert "--draw draws boxes, and the task of this model is classification" in done.stderr
    assert not (tmp_path / "drawn").exists()


def test_a_run_pushes_its_best_model_and_anyone_loads_it(tmp_path):
    with HubServer() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        flags = [*TINY, "--output_dir", tmp_path, "--experiment_name", "p"]
        said = run_script("train.py", *flags, "--push_to_hub", "--hub_model_id", "tester/digits", env=env).stdout
        assert f"pushed    {hub.url}/tester/digits/commit/" in said
        pushed = hub.repositories["tester/digits"]
        assert set(pushed) == {"README.md", "config.json", "model.safetensors"}
        for name, content in pushed.items():
            assert (tmp_path / "p" / "best" / name).read_bytes() == content
        assert b"simple_cnn" in pushed["README.md"]
        assert TOKEN.encode() not in b"".join(p.read_bytes() for p in (tmp_path / "p").rglob("*") if p.is_file())
        code = (
            "import torch, models; a = models.load('tester/digits');"
            f"b = models.load({str(tmp_path / 'p')!r}); c = models.BaseModel.from_pretrained('tester/digits');"
            "x = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8);"
            "assert torch.equal(a(x), b(x)) and torch.equal(a(x), c(x))"
        )
        launch(sys.executable, "-c", code, **env, PYTHONPATH=str(ROOT))
        env["HF_TOKEN"] = "hf_wrong"
        done = run_script("push.py", tmp_path / "p", "--hub_model_id", "tester/other", rc=1, env=env)
        assert "the hub did not take the model" in done.stderr
        assert "Traceback" not in done.stderr


PRESETS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize(  # the commands of the README run the others, see tests/test_readme.py
    "preset", [pytest.param(name, marks=[] if name == "cifar10.yaml" else pytest.mark.long) for name in PRESETS]
)
def test_every_preset_trains_at_tiny_size(preset, tmp_path, image_folder):
    data = ["--train_data_dir", image_folder, "--image_size", "16", "--split", "0.75", "0.25", "0"]
    own = {"digit_captions.yaml": [], "digit_scenes.yaml": [], "bccd.yaml": ["--dataset", "digit_scenes"]}
    data = own.get(preset, data)
    flags = ["--config", ROOT / "configs" / preset, *TINY, "--warmup_steps", "1", "--output_dir", tmp_path]
    said = run_script("train.py", *flags, *data).stdout
    assert f"best      {'accuracy' if preset not in own else 'recall_at_1' if 'captions' in preset else 'map'}" in said


def test_commands_run_uninstalled_from_anywhere_and_as_a_module(tmp_path):
    run_script("train.py", *TINY, "--output_dir", tmp_path, "--experiment_name", "here", cwd=tmp_path)
    launch(sys.executable, "-m", "scripts.train", *TINY, "--output_dir", str(tmp_path), "--experiment_name", "module")
    here, module = (lines_of(tmp_path / name) for name in ("here", "module"))
    assert here == module
    said = run_script("summary.py", "--model", "resnet18", cwd=tmp_path).stdout
    assert "resnet18: 11,172,810 parameters" in said


@pytest.mark.parametrize(
    ("flags", "rc", "words"),
    [
        (["--model", "resnet19"], 2, ["--model resnet19", "resnet18"]),
        (["--task", "detecton"], 2, ["--task detecton"]),
        (["--train_data_dir", "nowhere", "--image_column", "img"], 2, ["--image_column belongs to --dataset"]),
        (["--monitor", "acuracy"], 2, ["--monitor acuracy", "accuracy"]),
        (["--batch_size", "5000"], 1, ["1438 training samples", "5000", "--batch_size"]),
        (["--train_data_dir", "nowhere"], 1, ["no such folder of images", "nowhere"]),
        (["--lr", "1e30", "--optimizer", "sgd"], 3, ["loss is nan at step", "--lr"]),
        (["--output_dir", "/proc/nowhere"], 1, ["cannot write the run folder", "/proc/nowhere", "--output_dir"]),
    ],
)
def test_a_fault_is_one_block_that_says_what_to_do(tmp_path, flags, rc, words):
    done = run_script("train.py", "--output_dir", tmp_path, *flags, rc=rc)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    for word in words:
        assert word in done.stderr
    assert rc != 2 or not any(tmp_path.iterdir())  # no run was begun


def test_running_out_of_memory_says_what_to_lower():
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("")):
        text, code = block(error)
        assert code == 1
        assert "out of memory" in text
        assert "--micro_batch_size" in text


def test_an_operation_that_is_not_deterministic_says_which():
    text, _ = block(RuntimeError(
        "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation ..."
    ))  # fmt: skip
    assert "--deterministic: adaptive_max_pool2d_backward_cuda does not have a deterministic implementation\n" in text
    assert "leave --deterministic out" in text


@pytest.mark.parametrize(
    ("micro_batch", "dropout", "before", "synced", "lines"),
    [
        (4, 0.1, 1, False, ["dropout: the 4 and 2 images computed at once are part of the result",
                     "this changes here: until step 7 it was 1 process(es) x 3 x 4"]),
        (4, 0.1, None, False, ["dropout: the 4 and 2 images computed at once are part of the result"]),
        (4, 0.1, 2, False, ["dropout: the 4 and 2 images computed at once are part of the result"]),
        (6, 0.1, 1, False, ["dropout: the 6 images computed at once are part of the result"]),
        (6, 0.1, 1, True, ["dropout: the 12 images computed at once are part of the result",
                           "this changes here: until step 7 it was 1 process(es) x 2 x 6"]),
        (6, 0.1, 2, True, ["dropout: the 12 images computed at once are part of the result"]),
        (4, 0.0, 1, False, []),
    ],
)  # fmt: skip
def test_another_cut_of_a_batch_is_told_where_it_changes_the_result(micro_batch, dropout, before, synced, lines):
    trainer: Any = SimpleNamespace(
        plain_model=build("simple_cnn", num_classes=2, image_size=8, dropout=dropout), batch_size=12,
        config=make_config(batch_size=12, micro_batch_size=micro_batch, sync_batch_norm=synced),
        processes=SimpleNamespace(number=2),
        state=SimpleNamespace(step=7, processes=before),
    )  # fmt: skip
    assert lines_of_the_cut(trainer) == lines
    assert cut(trainer, 2) == "2 process(es) x " + ("(4 + 2)" if micro_batch == 4 else "1 x 6")


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_run_reaches_98_percent(tmp_path, seed):
    run_script("train.py", "--output_dir", tmp_path, "--experiment_name", "r", "--seed", seed)
    assert json.loads((tmp_path / "r" / "status.json").read_text())["best"]["value"] >= 0.98


@pytest.mark.long
@pytest.mark.skipif(not (SHARED_DATA / "cifar10").is_dir(), reason="no CIFAR-10 beside the project")
def test_the_cifar10_preset_trains_on_the_real_files(tmp_path):
    flags = [
        "--config",
        ROOT / "configs" / "cifar10.yaml",
        "--dataset",
        SHARED_DATA / "cifar10",
        "--model",
        "simple_cnn",
    ]
    run_script("train.py", *flags, "--max_steps", "60", "--warmup_steps", "10", "--lr", "0.05", "--ema_decay", "0",
               "--output_dir", tmp_path, "--experiment_name", "c")  # fmt: skip
    assert json.loads((tmp_path / "c" / "status.json").read_text())["best"]["value"] > 0.2


def test_a_run_begins_with_the_weights_it_is_given(tmp_path):
    from scripts.wiring import build_model

    data = load_data(make_config())
    given = build_model(make_config(seed=1), data)
    given.save_pretrained(tmp_path)
    other = build_model(make_config(seed=2), data)
    begun = build_model(make_config(seed=2, weights=str(tmp_path)), data)
    assert all(torch.equal(a, b) for a, b in zip(begun.state_dict().values(), given.state_dict().values()))
    assert not torch.equal(other.head.weight, given.head.weight)


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("broken", "words"),
    [("cut", r"sample \d+, after step 0"), ("augment", r"one of the samples (\d+, ){8}\.\.\., after")],
)
def test_an_error_of_changed_code_names_the_sample(image_folder, tmp_path, capsys, monkeypatch, workers, broken, words):
    def boom(*_, **__):
        raise ValueError("boom")

    monkeypatch.setattr(Transform, broken, boom)
    flags = ["--train_data_dir", str(image_folder), "--num_workers", workers, "--output_dir", str(tmp_path)]
    assert train.main([*flags, "--batch_size", "12", "--image_size", "8"]) == 1
    said = capsys.readouterr().err
    assert "ValueError: boom" in said
    assert re.search(words, said), said


def test_predictions_of_before_stay_where_there_are_no_weights(tmp_path):
    (tmp_path / "p.jsonl").write_text("before")
    run_script("predict.py", "--weights", "nowhere/x", tmp_path, "--output", tmp_path / "p.jsonl", rc=2)
    assert (tmp_path / "p.jsonl").read_text() == "before"


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_neither_stops_nor_holds_a_run(tmp_path, where):
    (tmp_path / "wandb.py").write_text(
        "import time\n"
        "def hang(name):\n"
        f"    if name == {where!r}: time.sleep(3000)\n"
        "class Run:\n"
        "    def log(self, values): hang('log')\n"
        "    def log_artifact(self, artifact): pass\n"
        "    def finish(self): hang('finish')\n"
        "class Artifact:\n"
        "    def __init__(self, *_, **__): pass\n"
        "    def add_dir(self, folder): pass\n"
        "def init(**_): hang('init'); return Run()\n"
        "def Settings(**_): pass\n"
    )
    flags = [*TINY, "--output_dir", tmp_path, "--experiment_name", "t", "--use_wandb", "--stop_after_steps", "2"]
    command = [sys.executable, "-c", f"from trainer import trackers; trackers.FINISH_SECONDS = 2; {RUN_TRAIN}", *flags]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 75, done.stderr
    assert "warning: W&B stopped (it did not finish in 2 s)" in done.stdout
    assert json.loads((tmp_path / "t" / "status.json").read_text())["state"] == "preempted"
