"""`--check` finds what would stop a long run, and leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.arguments import make_config
from scripts import logins, preflight
from scripts.session import run as train_session
from tests.conftest import ROOT, run_script
from tests.hub_server import TOKEN, HubServer
from trainer import saving
from trainer.main_trainer import MainTrainer

TINY = {"batch_size": 16, "micro_batch_size": 8, "epochs": 2, "ema_decay": 0.9, "cpu_threads": 1}


def check(folder: Path, rc: int = 0, **options) -> int:
    code = preflight.check(make_config(**({"output_dir": str(folder / "runs"), "check": True} | TINY | options)))
    assert code == rc
    return code


def marks(said: str) -> dict[str, str]:
    """The mark of each check by its name."""
    lines = [line for line in said.splitlines() if line.startswith(("ok", "FAIL"))]
    return {line[6:18].strip(): line[:6].strip() for line in lines}


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_the_real_command_tells_a_line_each_and_leaves_no_trace(tmp_path):
    flags = "--check --experiment_name long --batch_size 64 --micro_batch_size 32 --use_tensorboard --use_wandb".split()
    said = run_script("train.py", *flags, cwd=tmp_path).stdout
    everything = ["run folder", "data", "step", "evaluation", "checkpoint", "space", "pictures", "TensorBoard", "W&B"]
    assert marks(said) == dict.fromkeys(everything, "ok")
    assert max(map(len, said.splitlines())) <= 80
    for words in (
        "runs/long will be made",
        "digits: 1,438 train, 180 val; 10 classes, 139 (8) to 146 (1)",
        "batch 64 (1 x 2 x 32)",
        "loaded again, equal to the bit",
        "500 of 1,438 train, 180 of 180 val: all can be used",
        "WANDB_MODE=offline",
        "for 440 steps",
        "all 9 checks passed",
    ):
        assert words in said
    assert list(tmp_path.iterdir()) == []


def test_swas_pass_for_batch_norm_is_tried_where_there_is_one(tmp_path, capsys):
    import tests.bn_net  # noqa: F401  which puts its model into the table

    options = {"model": "bn_net", "ema_decay": 0.0, "swa_start_epoch": 1}
    check(tmp_path, **options)
    said = capsys.readouterr().out
    assert marks(said)["averaging"] == "ok"
    assert "BatchNorm's statistics on 8 samples" in said
    check(tmp_path, **options | {"model": "simple_cnn"})
    assert "averaging" not in marks(capsys.readouterr().out)


def test_two_processes_check_alike_and_tell_it_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts" / "train.py"), "--check", "--batch_size", "32", "--ema_decay", "0.9"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert marks(done.stdout)["checkpoint"] == "ok"
    assert done.stdout.count("batch 32 (2 x 1 x 16)") == 1
    assert "all 7 checks passed" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_the_check_without_a_trace(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--check", "--output_dir", str(tmp_path / "a" / "b")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end and not list(tmp_path.glob("a/b/.check-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_is_read_and_nothing_of_it_changes(tmp_path, capsys):
    plain = TINY | {"output_dir": str(tmp_path / "runs"), "experiment_name": "x", "max_steps": 8}
    train_session(make_config(**plain, stop_after_steps=3))
    before = content(tmp_path)
    capsys.readouterr()
    check(tmp_path, experiment_name="x", max_steps=8)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'runs' / 'x'} will be continued after step 3" in " ".join(said.split())
    assert "for 5 steps" in said
    check(tmp_path, rc=1, experiment_name="x", max_steps=8, lr=0.5)
    said = capsys.readouterr().out
    assert marks(said)["run folder"] == "FAIL"
    assert "--lr was 0.002, now 0.5" in " ".join(said.split())
    assert "fix: continue with the same options" in said
    assert content(tmp_path) == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_cannot_be_used_are_named(tmp_path, image_folder, capsys, streaming):
    (image_folder / "dark" / "3.png").write_text("no picture")
    options = {"train_data_dir": str(image_folder), "batch_size": 4, "num_workers": 0, "streaming": streaming}
    check(tmp_path, rc=1, split=(0.75, 0.25, 0.0), **options)
    said = capsys.readouterr().out
    assert marks(said)["pictures"] == "FAIL"
    assert f"{image_folder / 'dark' / '3.png'}: cannot decode" in " ".join(said.split())
    assert "--max_bad_fraction" in said
    check(tmp_path, split=(0.75, 0.25, 0.0), **options, max_bad_fraction=0.9)
    said = capsys.readouterr().out
    assert "1 cannot be used" in said
    assert "dark/3.png" in said


def test_pictures_are_looked_at_all_over_a_large_set(tmp_path, monkeypatch):
    from data.dataset import load_data
    from scripts import audit

    split = load_data(make_config()).train
    monkeypatch.setattr(audit, "PICTURES", 100)
    ids = audit.spread(split)
    places = np.searchsorted(split.ids, ids)
    for part in (places, places[:20]):  # also where time ends it early
        assert np.diff(np.sort([0, *part, len(split)])).max() <= 3 * len(split) / len(part)
    assert len(set(ids.tolist())) == 100


def test_classes_without_training_pictures_are_noted(tmp_path, image_folder, capsys):
    (image_folder / "third").mkdir()
    Image.new("L", (12, 10), 40).save(image_folder / "third" / "0.png")
    options = {"train_data_dir": str(image_folder), "batch_size": 4, "num_workers": 0}
    check(tmp_path, split=(0.4, 0.6, 0.0), **options)
    assert "note              no training sample is of third" in capsys.readouterr().out


def test_too_little_space_is_told_with_the_need_and_the_cure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=11_000_000))
    check(tmp_path, keep_last=1, keep_best=0)
    assert "2 checkpoints and best/ need" in capsys.readouterr().out
    check(tmp_path, rc=1, keep_last=3, keep_best=1)
    said = capsys.readouterr().out
    assert marks(said)["space"] == "FAIL"
    assert "5 checkpoints and best/ need" in said
    assert "11.0 MB are free" in said
    assert "--keep_last" in said


def test_a_state_that_does_not_come_back_is_found(tmp_path, capsys, monkeypatch):
    load = saving.load_checkpoint

    def without_averages(trainer, folder):
        load(trainer, folder)
        name = next(iter(trainer.ema.average))
        trainer.ema.average[name].view(-1)[0] += 1e-6

    monkeypatch.setattr(saving, "load_checkpoint", without_averages)
    check(tmp_path, rc=1)
    said = capsys.readouterr().out
    assert marks(said)["checkpoint"] == "FAIL"
    assert "what is loaded is not what was saved: ema." in said
    assert marks(said)["pictures"] == "ok"  # the others are checked all the same
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}, ["a"]),
        ({"a": torch.tensor(1.0)}, {"a": torch.tensor(1.0, dtype=torch.float64)}, ["a"]),
        ({"a": [torch.ones(2), {"b": 1}]}, {"a": [torch.ones(2), {"b": 2}]}, ["a.1.b"]),
        ({"a": 1}, {"a": 1, "c": torch.ones(1)}, ["c"]),
        ({"a": float("nan"), "b": (1, 2)}, {"a": float("nan"), "b": (1, 2)}, []),
        ({"a": (1, 2)}, {"a": (1, 2, 3)}, ["a"]),
    ],
)
def test_every_bit_of_a_nested_state_is_compared(one, other, found):
    assert list(preflight.differences("", one, other)) == found


def test_a_step_that_fails_says_what_to_do(tmp_path, capsys, monkeypatch):
    check(tmp_path, rc=1, lr=1e30, optimizer="sgd")
    said = capsys.readouterr().out
    assert marks(said)["step"] == "FAIL"
    assert "loss is nan at step 2" in said
    assert "lower --lr" in said

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(MainTrainer, "forward_pass", full)
    check(tmp_path, rc=1)
    said = capsys.readouterr().out
    assert (marks(said)["step"], marks(said)["checkpoint"]) == ("FAIL", "ok")
    assert "fix: lower --micro_batch_size" in said
    assert "about" not in said  # no time is known
    assert not (tmp_path / "runs").exists()


def test_all_micro_batches_of_whole_batches_are_computed(tmp_path, monkeypatch):
    sizes, forward = [], MainTrainer.forward_pass

    def noted(trainer, batch):
        sizes.append(len(batch["labels"]))
        return forward(trainer, batch)

    monkeypatch.setattr(MainTrainer, "forward_pass", noted)
    check(tmp_path, batch_size=40, micro_batch_size=16)
    assert sizes[: 3 * preflight.STEPS] == [14, 14, 12] * preflight.STEPS
    assert len(sizes) == 3 * preflight.STEPS + 1  # and one evaluation


def test_the_largest_batch_of_a_schedule_is_tried_and_its_steps_are_counted(tmp_path, capsys):
    check(tmp_path, epochs=5, batch_size=32, batch_size_schedule=("2:128", "4:64"), warmup_steps=100)
    said = capsys.readouterr().out
    assert "batch 128 " in said
    assert "for 132 steps" in said  # of 1,438 samples: 44 + 44 + 11 + 11 + 22


def test_slow_steps_end_the_trial_early(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "STEPS_SECONDS", 0.0)
    steps, optimize = [], MainTrainer.optimize
    monkeypatch.setattr(MainTrainer, "optimize", lambda *given: (steps.append(1), optimize(*given)))
    check(tmp_path, micro_batch_size=16)
    assert len(steps) == 1
    assert "for 178 steps" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_one_block():
    done = run_script("train.py", "--check", "--output_dir", "/proc/nowhere", rc=1)
    assert "cannot write the run folder" in done.stderr
    assert "--output_dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_wandb_needs_a_key_or_a_mode_without(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(logins.UserError, match="no key for api.wandb.ai") as error:
        logins.wandb_found()
    assert "wandb login" in str(error.value)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert "there is a key for api.wandb.ai" in logins.wandb_found()[0]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine.org")
    with pytest.raises(logins.UserError, match="no key for wandb.mine.org"):
        logins.wandb_found()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "nothing is sent" in logins.wandb_found()[0]


def test_the_hub_is_asked_who_we_are_and_whether_we_may_write(tmp_path):
    code = "import sys; from scripts.logins import hub_found, UserError\n" + (
        "for name in sys.argv[1:]:\n    try:\n        print(hub_found(name)[0])\n"
        "    except UserError as error:\n        print(' '.join(str(error).split()))"
    )

    def ask(hub: HubServer, *names: str, **env: str) -> list[str]:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"} | env
        done = subprocess.run(
            [sys.executable, "-c", code, *names], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with HubServer() as hub:
        own, other = ask(hub, "tester/digits", "somebody/digits")
        assert own == "tester may write: tester/digits"
        assert "you are tester, and somebody/digits belongs to somebody" in other
        assert "--hub_model_id tester/digits" in other
        assert "the hub does not know you: Invalid user token" in ask(hub, "tester/x", HF_TOKEN="hf_wrong")[0]
        assert "HF_HUB_OFFLINE is set" in ask(hub, "tester/x", HF_HUB_OFFLINE="1")[0]
        hub.account["auth"] = {"accessToken": {"role": "read"}}
        assert "the token of tester may read only" in ask(hub, "tester/x")[0]
        assert "there is no token for the hub" in ask(hub, "tester/x", HF_TOKEN="")[0]
        assert hub.repositories == {}


def test_check_is_no_part_of_a_run(tmp_path):
    from trainer.run_folder import saved_yaml

    assert "\ncheck:" not in saved_yaml(make_config(check=True))
    assert json.dumps(saved_yaml(make_config(check=True))) == json.dumps(saved_yaml(make_config()))
