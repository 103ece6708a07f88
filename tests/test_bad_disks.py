"""Disks that are full, read-only or gone, and folders that others use: nothing that was saved is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from configs.errors import ConfigError, UserError
from tests.conftest import ROOT, exit_code_of, lines_of, same_run
from tests.tiny import TinyNet, tiny_batches, tiny_trainer
from trainer import checkpoint, run_folder
from trainer.main_trainer import MainTrainer
from trainer.saving import Saver


class WideNet(TinyNet):
    """110 kB of weights, so that a checkpoint of 440 kB does not fit everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 1500, 3), nn.Conv2d(1500, 8, 1))


def run_in(folder: Path, name: str = "x", **options) -> MainTrainer:
    plain = enumerate(tiny_batches([8] * 4))
    batches = [{"images_BCHW": x, "labels": y, "ids": torch.arange(8) + 8 * place} for place, (x, y) in plain]
    usual = {
        "batch_size": 8, "epochs": 2, "ema_decay": 0.9, "save_every_steps": 2, "trace_samples": True, "log_every": 1,
        "experiment_name": name,
    }  # fmt: skip
    return tiny_trainer(folder, batches, batches, model=WideNet(), **(usual | options))


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs of so many kB; skips where this machine does not allow one."""
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: that needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    run_in(folder).train()
    return folder / "x"


@pytest.mark.parametrize("kilobytes", [40, *range(100, 1300, 150)])
def test_a_full_disk_is_one_block_and_the_same_command_goes_on_once_there_is_room(tmp_path, undisturbed, kilobytes):
    """From the first file to the third checkpoint, best/ among them."""
    checkpoints = tmp_path / "disk" / "x" / "checkpoints"
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        for _ in range(2):  # once more on the full disk
            before = [path.name for path in checkpoint.all_checkpoints(checkpoints)]
            with pytest.raises(UserError) as error:
                run_in(disk).train()
            told = str(error.value)
            assert len(told.splitlines()) == 3
            assert f"where: {disk}" in told
            assert re.search(r"No space left on device|unexpected pos .* MB free, a checkpoint has 0.4 MB", told)
            after = sorted(path.name for path in checkpoints.iterdir())
            assert after[: len(before)] == before
            assert not [name for name in after if checkpoint.fault(checkpoints / name)]
        enlarge(disk)
        run_in(disk).train()
        same_run(undisturbed, disk / "x")


def test_a_disk_that_fills_up_behind_a_save_stops_the_run_before_the_next(tmp_path, undisturbed, monkeypatch):
    """The state lies in files; there is no room for the manifest, which the thread writes."""
    commit = checkpoint.commit

    def no_room(hidden):
        if "00000004" in hidden.name:
            with (disk / "other").open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(1024))
        return commit(hidden)

    with small_disk(tmp_path / "disk", 5000) as disk:
        monkeypatch.setattr(checkpoint, "commit", no_room)
        trainer = run_in(disk)
        with pytest.raises(UserError, match="No space left on device"):  # of the manifest, or of a line
            trainer.train()
        assert trainer.state.step <= 6
        (disk / "other").unlink()
        monkeypatch.undo()
        run_in(disk).train()
        same_run(undisturbed, disk / "x")


@pytest.mark.parametrize("delay_seconds", [0, 0.2])
def test_a_save_that_fails_in_the_background_stops_the_run_within_a_save_interval(
    tmp_path, undisturbed, monkeypatch, delay_seconds
):
    def fail(_):
        time.sleep(delay_seconds)
        raise OSError(errno.EIO, "Input/output error")

    run_in(tmp_path, stop_after_steps=3).train()
    trainer = run_in(tmp_path, save_every_steps=4, epochs=2)
    monkeypatch.setattr(checkpoint, "commit", fail)
    with pytest.raises(UserError, match="step 4 could not be written: .*Input/output error"):
        trainer.train()
    assert trainer.state.step <= 8
    assert json.loads((tmp_path / "x" / "status.json").read_text())["state"] == "failed"
    names = sorted(path.name for path in (tmp_path / "x" / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000003"]
    monkeypatch.undo()
    run_in(tmp_path).train()
    same_run(undisturbed, tmp_path / "x")


def test_a_save_that_has_failed_is_heard_at_the_next_step(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    def save_and_wait(saver):
        save(saver)
        if saver.thread:
            saver.thread.join()

    save = Saver.save
    monkeypatch.setattr(Saver, "save", save_and_wait)
    monkeypatch.setattr(checkpoint, "commit", fail)
    trainer = run_in(tmp_path)
    with pytest.raises(UserError, match="step 2 could not be written: .*Input/output error"):
        trainer.train()
    assert trainer.state.step == 3


@pytest.mark.parametrize("kilobytes", [1, 20, 105, 150, 200])
def test_a_file_size_limit_is_told_like_a_full_disk(tmp_path, undisturbed, kilobytes):
    """For machines where no disk can be mounted."""
    resource = pytest.importorskip("resource")

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, 1024 * kilobytes))
        with pytest.raises(UserError) as error:
            run_in(tmp_path).train()
        assert f"where: {tmp_path}" in str(error.value)

    assert exit_code_of(limited) == 0
    run_in(tmp_path).train()
    same_run(undisturbed, tmp_path / "x")


def untouched(path: Path) -> tuple[int, ...]:
    """Another one as soon as it is written to; reading may be noted by the time of access."""
    found = path.stat()
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@pytest.fixture
def open_path():
    """A temporary folder that others reach; they cannot reach pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("folder", ["", "x", "x/checkpoints", "x/best"])
def test_a_folder_that_may_not_be_written_is_named_and_nothing_changes(open_path, undisturbed, folder):
    """As another user: the output folder before the run, or a folder of the run when it is continued."""
    nobody = 65534
    if folder:
        run_in(open_path, stop_after_steps=3).train()
        (open_path / "x" / "best").mkdir()
        for path in [open_path, *open_path.rglob("*")]:
            os.chown(path, nobody, nobody)
    (open_path / folder).chmod(0o555)
    before = {path: untouched(path) for path in open_path.rglob("*")}

    def as_nobody():
        os.setegid(nobody)
        os.seteuid(nobody)
        with pytest.raises(UserError, match="[Pp]ermission denied") as error:
            run_in(open_path).train()
        assert f"where: {open_path}" in str(error.value)

    assert exit_code_of(as_nobody) == 0
    saved = {path: found for path, found in before.items() if "step_" in str(path)}
    assert all(untouched(path) == found for path, found in saved.items())
    (open_path / folder).chmod(0o755)
    run_in(open_path).train()
    same_run(undisturbed, open_path / "x")


def test_a_tracker_that_fills_its_disk_stops_nothing(tmp_path, undisturbed, capfd):
    (tmp_path / "x").mkdir()
    with small_disk(tmp_path / "x" / "tensorboard", 4):
        run_in(tmp_path, use_tensorboard=True, epochs=20).train()
    said = capfd.readouterr()
    assert said.out.count("warning: TensorBoard stopped (OSError: [Errno 28] No space left on device)") == 1
    assert said.err == ""
    assert len(lines_of(tmp_path / "x", "train")) == 80


def test_a_run_folder_that_is_removed_while_training_stops_the_run_at_the_next_save(tmp_path, undisturbed):
    trainer = run_in(tmp_path)
    batches = list(trainer.train_loader)

    def removed():
        yield from batches[:2]
        trainer.saver.finish()
        shutil.rmtree(tmp_path / "x")
        yield from batches[2:]

    trainer.train_loader = removed()
    with pytest.raises(UserError, match="step 4 could not be written: .*the folder has gone"):
        trainer.train()
    run_in(tmp_path).train()
    same_run(undisturbed, tmp_path / "x")


START = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from configs.errors import UserError
from tests.test_bad_disks import run_in
try:
    trainer = run_in(Path({folder!r}))
    print("ready", flush=True)
    {before}
    trainer.train()
    print("done", flush=True)
except UserError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start(folder: Path, before: str = "pass") -> subprocess.Popen[str]:
    """A process that trains after it has done something."""
    code = START.format(root=str(ROOT), folder=str(folder), before=before)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_second_start_names_the_owner_and_a_killed_owner_is_followed_at_once(tmp_path, undisturbed):
    run_in(tmp_path, stop_after_steps=3).train()
    owner = start(tmp_path, before="time.sleep(60)")
    try:
        owner.stdout.readline()
        with pytest.raises(ConfigError, match=f"the run is being trained by process {owner.pid} on ") as error:
            run_in(tmp_path)
        assert len(str(error.value).splitlines()) == 3
    finally:
        owner.kill()
        owner.communicate()
    run_in(tmp_path).train()
    same_run(undisturbed, tmp_path / "x")


def test_a_start_that_comes_too_late_leaves_the_lock_to_the_one_that_made_the_folder(tmp_path, monkeypatch):
    late = run_folder.RunFolder(tmp_path / "x", writes=True)
    (tmp_path / "x").mkdir()  # the other has not locked it yet
    monkeypatch.setattr(late, "lock", lambda: pytest.fail("it would be the owner for a moment"))
    with pytest.raises(ConfigError, match="another start has taken the name just now"):
        late.create(only_new=False)


@pytest.mark.long
@pytest.mark.parametrize("exists", [False, True])
def test_of_twenty_starts_at_once_one_runs_and_the_others_are_refused(tmp_path, undisturbed, exists):
    if exists:
        run_in(tmp_path, stop_after_steps=3).train()
    go = tmp_path / "go"
    many = [start(tmp_path, before=f"while not Path({str(go)!r}).exists(): time.sleep(0.001)") for _ in range(20)]
    first = [process.stdout.readline() for process in many]
    go.touch()
    said = [line + process.stdout.read() for line, process in zip(first, many)]
    codes = sorted(process.wait(120) for process in many)
    assert codes == [0] + [2] * 19
    same_run(undisturbed, tmp_path / "x")
    refused = [text.removeprefix("ready\n") for text, process in zip(said, many) if process.returncode == 2]
    assert [text for text in refused if len(text.splitlines()) != 3] == []
    assert all("is being trained by" in text or "another start has taken the name" in text for text in refused)
