"""A run that comes back goes on as if it had never stopped."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from configs.errors import ConfigError, UserError
from tests.conftest import lines_of, run_script, same_run
from tests.tiny import TinyNet, tiny_batches, tiny_trainer, weights
from trainer import checkpoint, starting

# accumulation, dropout (of simple_cnn), augmentation, mixing, averaging, clipping: whatever has or draws state
OPTIONS = (
    "--epochs 2 --batch_size 96 --micro_batch_size 32 --augment trivialaugment --random_erasing 0.3 --mixup 0.2 "
    "--cutmix 1.0 --ema_decay 0.99 --grad_clip --warmup_steps 5 --trace_samples --log_every 4 --save_every_steps 5 "
    "--cpu_threads 1"
).split()
FINAL = "step_00000028"


def train(folder: Path, name: str, *flags: str, rc: int = 0) -> str:
    return run_script("train.py", "--output_dir", folder, "--experiment_name", name, *OPTIONS, *flags, rc=rc).stdout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "whole")
    ids = [json.loads(line)["ids"] for line in (folder / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [len(step) for step in ids] == [96] * 28
    assert len({number for step in ids[:14] for number in step}) == 14 * 96
    return folder / "whole"


def test_resumed_run_matches_uninterrupted_with_other_workers(uninterrupted):
    """Stopped inside the first epoch, at its end, and inside the second."""
    folder = uninterrupted.parent
    for workers, steps in (("0", "8"), ("2", "6"), ("0", "7")):
        said = train(folder, "parts", "--num_workers", workers, "--stop_after_steps", steps, rc=75)
        assert "--resume" in said
    train(folder, "parts", "--num_workers", "2")
    same_run(uninterrupted, folder / "parts")
    assert json.loads((folder / "parts" / "status.json").read_text())["state"] == "done"


def test_resume_by_path_takes_the_options_of_the_run(uninterrupted):
    folder = uninterrupted.parent
    shutil.copytree(uninterrupted, folder / "copy")
    said = run_script("train.py", "--resume", folder / "copy").stdout
    assert "accuracy" in said  # it is finished: its result is told
    assert lines_of(folder / "copy") == lines_of(uninterrupted)
    shutil.rmtree(folder / "copy" / "checkpoints" / FINAL)
    oldest = min((folder / "copy" / "checkpoints").iterdir())
    run_script("train.py", "--resume", oldest)
    same_run(uninterrupted, folder / "copy")


def test_config_yaml_repeats_a_run_under_another_name(uninterrupted):
    folder = uninterrupted.parent
    run_script(
        "train.py", "--config", uninterrupted / "config.yaml", "--output_dir", folder, "--experiment_name", "twin"
    )
    same_run(uninterrupted, folder / "twin")


class BatchNormNet(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("scheduler", ["plateau", "one_cycle", "step"])
@pytest.mark.parametrize("stop", [3, 5, 12])
def test_resumed_plain_lists_match_uninterrupted(tmp_path, optimizer, scheduler, stop):
    batches = tiny_batches([4] * 10)
    options = {
        "batch_size": 8, "epochs": 4, "optimizer": optimizer, "scheduler": scheduler, "decay_epochs": 1, "lr": 0.01,
        "ema_decay": 0.9, "log_every": 3, "min_delta": 0.1, "monitor": "loss",
    }  # fmt: skip
    whole = tiny_trainer(tmp_path, batches, batches, model=BatchNormNet(), experiment_name="whole", **options)
    whole.train()
    part = tiny_trainer(
        tmp_path, batches, batches, model=BatchNormNet(), experiment_name="part", stop_after_steps=stop, **options
    )
    assert part.train()["state"] == "preempted"
    torch.manual_seed(99)
    back = tiny_trainer(tmp_path, batches, batches, model=BatchNormNet(), experiment_name="part", **options)
    back.train()
    assert back.session_steps == 20 - stop
    assert torch.equal(weights(back), weights(whole))
    assert all(torch.equal(back.ema.average[name], value) for name, value in whole.ema.average.items())
    assert lines_of(back.run.path) == lines_of(whole.run.path)


def started(tmp_path: Path, **options):
    """A run of two epochs that has saved steps 2 and 4."""
    batches = tiny_batches([8] * 2)
    plain = {"batch_size": 8, "epochs": 2, "experiment_name": "x"}
    return tiny_trainer(tmp_path, batches, batches, **(plain | options))


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    started(tmp_path).train()
    newest = tmp_path / "x" / "checkpoints" / "step_00000004"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    again = started(tmp_path)
    assert again.state.step == 2
    again.train()
    assert "step_00000004 is damaged and passed over: model.safetensors has changed" in capsys.readouterr().out
    assert checkpoint.fault(newest) is None


def test_no_intact_checkpoint_is_a_refusal(tmp_path):
    started(tmp_path).train()
    for folder in (tmp_path / "x" / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(UserError, match="none of the checkpoints is intact") as error:
        started(tmp_path)
    assert "state.json is missing" in str(error.value)


def test_stray_files_and_left_overs_of_a_killed_save_are_no_checkpoints(tmp_path):
    started(tmp_path, stop_after_steps=2).train()
    checkpoints = tmp_path / "x" / "checkpoints"
    (checkpoints / "notes").mkdir()
    (checkpoints / "step_abc").mkdir()
    (checkpoints / "step_00000009").write_text("a file")
    for left in (".step_00000003", ".step_00000004", ".removed_step_00000001"):  # by a run that saved other steps
        (checkpoints / left).mkdir()
        (checkpoints / left / "model.safetensors").write_text("half")
    (checkpoints / ".DS_Store").write_text("not ours")
    (checkpoints / ".step_notes").mkdir()
    (checkpoints / "step_00000001").symlink_to("nowhere")
    assert started(tmp_path).train()["state"] == "done"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        ".DS_Store", ".step_notes", "notes", "step_00000001", "step_00000002", "step_00000004", "step_00000009",
        "step_abc",
    ]  # fmt: skip
    assert (checkpoints / "notes").is_dir()
    assert (checkpoints / "step_00000009").read_text() == "a file"
    assert checkpoint.fault(checkpoints / "step_00000004") is None


def test_other_options_are_refused_with_both_values(tmp_path, capsys):
    started(tmp_path, stop_after_steps=2).train()
    with pytest.raises(ConfigError, match="--lr was 0.002, now 0.5; --seed was 0, now 1|--seed was 0, now 1; --lr was"):
        started(tmp_path, lr=0.5, seed=1)
    started(tmp_path, epochs=3).train()
    assert "--epochs was 2, now 3" in capsys.readouterr().out


def test_never_refuses_an_existing_run(tmp_path):
    started(tmp_path).train()
    with pytest.raises(ConfigError, match="--resume never"):
        started(tmp_path, resume="never")


def test_unnamed_runs_of_one_second_get_folders_of_their_own(tmp_path):
    paths = set()
    for _ in range(3):
        trainer = started(tmp_path, experiment_name=None)
        starting.open_run(trainer)
        paths.add(trainer.run.path)
    assert len(paths) == 3


def test_a_checkpoint_holds_no_pickle_that_could_execute(tmp_path):
    started(tmp_path, ema_decay=0.9).train()
    names = {path.name for path in (tmp_path / "x" / "checkpoints" / "step_00000004").iterdir()}
    assert names == {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.bin",
        "config.json",
        "state.json",
        "manifest.json",
    }


def test_going_back_sets_the_later_checkpoints_aside(tmp_path):
    started(tmp_path, keep_last=5, epochs=4).train()
    checkpoints = tmp_path / "x" / "checkpoints"
    back = started(
        tmp_path,
        keep_last=5,
        experiment_name=None,
        resume=str(checkpoints / "step_00000004"),
        epochs=4,
        stop_after_steps=1,
    )
    back.train()
    names = sorted(folder.name for folder in checkpoints.iterdir())
    assert names == [
        "set_aside_step_00000006", "set_aside_step_00000008", "step_00000002", "step_00000004", "step_00000005",
    ]  # fmt: skip
    assert started(tmp_path, epochs=4).state.step == 5


def test_going_back_takes_the_best_model_back_as_well(tmp_path):
    """The later course was better; this one never is."""
    options = {"epochs": 4, "monitor": "loss", "monitor_mode": "min", "keep_last": 9}
    trainer = started(tmp_path, **options)
    trainer.train()
    path, later = trainer.run.path, trainer.state.monitor.best_step
    assert later > 2
    step_2 = path / "checkpoints" / "step_00000002"
    back = started(tmp_path, experiment_name=None, resume=str(step_2), stop_after_steps=1, **options)
    back.train()
    assert back.state.monitor.best_step == 2
    assert (path / "best" / "model.safetensors").read_bytes() == (step_2 / "model.safetensors").read_bytes()
    assert "after 2 steps" in (path / "best" / "README.md").read_text()
    assert f"after {later} steps" in (path / "set_aside_best" / "README.md").read_text()


def test_a_cut_off_config_lets_no_other_options_in(tmp_path):
    trainer = started(tmp_path)
    trainer.train()
    (trainer.run.path / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="--batch_size was 32, now 8"):
        started(tmp_path)


def test_a_long_output_dir_with_spaces_can_be_continued(tmp_path):
    folder = tmp_path / "a quite long folder name with spaces in it" / "and another folder with more spaces in it too"
    started(folder, stop_after_steps=2).train()
    assert started(folder).train()["state"] == "done"


def test_a_checkpoint_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    hidden, rename, faults = checkpoint.begin(tmp_path, 7), os.rename, []
    (hidden / "model.safetensors").write_bytes(b"weights")
    (hidden / "state.json").write_text('{"step": 7}')

    def noted(source, target):
        faults.append(checkpoint.fault(Path(source)))
        rename(source, target)

    monkeypatch.setattr(os, "rename", noted)
    assert checkpoint.fault(checkpoint.commit(hidden)) is None
    assert faults == [None]


def test_a_continued_run_keeps_its_threads_until_told_otherwise(tmp_path):
    threads = (os.cpu_count() or 1) + 1  # never the default
    started(tmp_path, cpu_threads=threads, stop_after_steps=2).train()
    assert started(tmp_path, cpu_threads=None).state.cpu_threads == torch.get_num_threads() == threads
    assert started(tmp_path, cpu_threads=1).state.cpu_threads == torch.get_num_threads() == 1


def test_lines_of_steps_that_are_done_again_are_forgotten(tmp_path):
    trainer = started(tmp_path, log_every=1, trace_samples=False)
    trainer.train()
    before = lines_of(trainer.run.path)
    with (trainer.run.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "loss": 1.0}\n{"kind": "test", "step": 9}\n{"kind": "tr')
    started(tmp_path, log_every=1, epochs=3).train()
    lines = lines_of(trainer.run.path)
    assert lines[: len(before) + 1] == [*before, {"kind": "test", "step": 9}]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_one_block_and_loses_nothing_that_was_saved(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = started(tmp_path, experiment_name="whole")
    whole.train()
    trainer = started(tmp_path)
    commit = checkpoint.commit
    monkeypatch.setattr(checkpoint, "commit", lambda hidden: full() if "00000004" in hidden.name else commit(hidden))
    with pytest.raises(UserError, match="the checkpoint of step 4 could not be written: .*No space left") as error:
        trainer.train()
    assert "earlier checkpoints stand" in str(error.value)
    assert [path.name for path in (tmp_path / "x" / "checkpoints").iterdir()] == ["step_00000002"]
    assert json.loads((tmp_path / "x" / "status.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    again = started(tmp_path)
    again.train()
    assert torch.equal(weights(again), weights(whole))


def test_a_fresh_run_begins_in_a_folder_of_its_own(tmp_path):
    started(tmp_path).train()
    for name in ("x-2", "x-3"):
        fresh = started(tmp_path, fresh=True)
        fresh.train()
        assert (fresh.run.path.name, fresh.session_steps) == (name, 4)
    assert started(tmp_path).state.step == 4


def test_saves_come_by_the_clock_as_well(tmp_path):
    batches = tiny_batches([8] * 5)
    options = {"batch_size": 8, "keep_last": 9}
    often = tiny_trainer(tmp_path, batches, experiment_name="often", save_every_minutes=1e-9, **options)
    often.train()
    assert [checkpoint.step_of(f) for f in checkpoint.all_checkpoints(often.run.checkpoints)] == [1, 2, 3, 4, 5]
    seldom = tiny_trainer(tmp_path, batches, experiment_name="seldom", save_every_minutes=10.0, **options)
    seldom.train()
    assert [checkpoint.step_of(f) for f in checkpoint.all_checkpoints(seldom.run.checkpoints)] == [5]


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """By a month, back and forth, at each look."""
    batches, options = tiny_batches([8] * 5), {"batch_size": 8, "keep_last": 9, "save_every_minutes": 10.0, "epochs": 2}
    steady = tiny_trainer(tmp_path, batches, experiment_name="steady", **options)
    steady.train()
    true_time, jumps = time.time, itertools.cycle([0.0, 2.6e6, -2.6e6])
    monkeypatch.setattr(time, "time", lambda: true_time() + next(jumps))
    tiny_trainer(tmp_path, batches, experiment_name="jumping", stop_after_steps=7, **options).train()
    jumping = tiny_trainer(tmp_path, batches, experiment_name="jumping", **options)
    jumping.train()
    assert torch.equal(weights(steady), weights(jumping))
    assert lines_of(steady.run.path) == lines_of(jumping.run.path)
    saved = [[checkpoint.step_of(f) for f in checkpoint.all_checkpoints(t.run.checkpoints)] for t in (steady, jumping)]
    assert saved == [[5, 10], [5, 7, 10]]


def test_trackers_go_on_with_the_same_run(tmp_path, monkeypatch):
    ids = []
    monkeypatch.setattr(starting, "open_trackers", lambda config, path, run_id: ids.append(run_id) or [])
    started(tmp_path, stop_after_steps=1).train()
    started(tmp_path).train()
    started(tmp_path, experiment_name="other").train()
    assert ids[0] == ids[1] != ids[2]


def test_the_wait_for_saves_is_logged(tmp_path):
    trainer = started(tmp_path)
    trainer.train()
    stalls = [line["save_stall_seconds"] for line in lines_of(trainer.run.path, "speed")]
    assert stalls[0] == 0  # the first save comes after the epoch's line
    assert 0 < stalls[1] < 10


def test_another_number_of_samples_is_another_run(tmp_path):
    flags = ["--output_dir", tmp_path, "--experiment_name", "x", "--batch_size", "4", "--epochs", "2"]
    folder = tmp_path / "images"
    for name, value in (("dark", 0), ("light", 255)):
        (folder / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (8, 8), value).save(folder / name / f"{number}.png")
    flags += ["--train_data_dir", folder, "--split", "0.8", "0.2", "0"]
    run_script("train.py", *flags, "--stop_after_steps", "2", rc=75)
    for number in range(10):
        Image.new("L", (8, 8), 255).save(folder / "light" / f"more_{number}.png")
    said = run_script("train.py", *flags, rc=2).stderr
    assert "the run was begun with 16 training samples, now there are 24" in said


def test_a_checkpoint_without_a_piece_that_the_run_needs_is_refused_by_name(tmp_path):
    """Its manifest does not list the piece, so that it holds."""
    started(tmp_path, ema_decay=0.9, stop_after_steps=2).train()
    folder = tmp_path / "x" / "checkpoints" / "step_00000002"
    for name in ("ema.safetensors", "optimizer.bin", "model.safetensors"):
        (folder / name).unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest[name]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert checkpoint.fault(folder) is None
        with pytest.raises(UserError, match=f"the checkpoint has no {name}"):
            started(tmp_path, ema_decay=0.9).train()


def test_a_checkpoint_of_another_step_or_with_another_file_is_damaged(tmp_path):
    started(tmp_path).train()
    folder = tmp_path / "x" / "checkpoints"
    (folder / "step_00000004").rename(folder / "step_00000009")
    assert checkpoint.fault(folder / "step_00000009") == "state.json is of step 4"
    (folder / "step_00000002" / "custom_checkpoint_0.pkl").write_bytes(b"no")
    assert checkpoint.fault(folder / "step_00000002") == "custom_checkpoint_0.pkl is not in the manifest"


def test_lines_of_an_evaluation_that_is_done_again_are_forgotten(tmp_path):
    """Stopped in the evaluation of step 2; killed, the next time, between the evaluation and its save."""
    started(tmp_path, experiment_name="whole").train()
    batches = tiny_batches([8] * 2)

    def stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches

    trainer = started(tmp_path)
    trainer.val_loader = stopped()
    assert trainer.train() == {"state": "preempted", "step": 2, "epoch": 0, "best": None, "reason": "SIGTERM"}
    with (tmp_path / "x" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "epoch", "step": 2, "loss": 1.0}\n{"kind": "val", "step": 2, "loss": 1.0}\n')
    trainer = started(tmp_path, epochs=2)
    trainer.train()
    assert lines_of(tmp_path / "x") == lines_of(tmp_path / "whole")


@pytest.mark.parametrize("end", [{"epochs": 2}, {"max_steps": 3}])
def test_a_run_stopped_in_its_last_evaluation_does_it_when_it_comes_back(tmp_path, end):
    started(tmp_path, experiment_name="whole", ema_decay=0.9, trace_samples=False, **end).train()
    trainer = started(tmp_path, ema_decay=0.9, **end)

    class StoppedAtTheEnd(list):
        def __iter__(self):
            if trainer.state.step == trainer.total_steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__iter__()

    trainer.val_loader = StoppedAtTheEnd(trainer.val_loader)
    assert trainer.train()["state"] == "preempted"
    again = started(tmp_path, ema_decay=0.9, **end)
    assert again.train()["state"] == "done"
    assert again.session_steps == 0
    assert lines_of(tmp_path / "x") == lines_of(tmp_path / "whole")


def test_a_run_killed_after_its_last_save_says_that_it_is_done_and_keeps_no_more_than_it_should(tmp_path):
    started(tmp_path, keep_last=9, monitor="loss").train()
    status = (tmp_path / "x" / "status.json").read_text()
    (tmp_path / "x" / "status.json").write_text('{"state": "running"}')
    started(tmp_path, keep_last=1, monitor="loss").train()
    assert (tmp_path / "x" / "status.json").read_text() == status
    assert [path.name for path in (tmp_path / "x" / "checkpoints").iterdir()] == ["step_00000004"]


def test_a_start_that_comes_second_by_a_moment_is_refused_and_touches_nothing(tmp_path):
    first, second = started(tmp_path), started(tmp_path)  # neither has found a folder
    first.train()
    before = {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="another start has taken the name"):
        second.train()
    assert before == {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert started(tmp_path).state.step == 4


def test_a_stop_that_cannot_be_saved_is_told_as_a_failure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    batches = tiny_batches([8] * 2)

    def stopped():
        for batch in batches:
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    trainer = started(tmp_path, max_steps=2)
    trainer.train_loader = stopped()
    monkeypatch.setattr(checkpoint, "begin", full)
    with pytest.raises(UserError, match="step 1 could not be written"):
        trainer.train()
    assert json.loads((tmp_path / "x" / "status.json").read_text())["state"] == "failed"


def test_a_status_that_names_a_secret_address_can_still_be_read(tmp_path):
    trainer = started(tmp_path)
    trainer.train()
    trainer.run.status("failed", reason="403 for url: https://host/file?X-Amz-Signature=abcdef0123456789")
    status = trainer.run.read_status()
    assert status["state"] == "failed"
    assert status["reason"].startswith("403 for url: https://host/file")
    assert "abcdef0123456789" not in status["reason"]
