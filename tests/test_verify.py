"""scripts/verify.py names whatever is wrong with a run, and changes nothing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import build
from scripts import verify
from tests.conftest import run_script
from tests.tiny import tiny_batches, tiny_trainer
from trainer.checkpoint import MANIFEST, sha256

FLIPS, TRUNCATIONS = 150, 50


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run of two epochs: two checkpoints with averaged weights, and best/."""
    batches = tiny_batches([4] * 2)
    folder = tmp_path_factory.mktemp("runs")
    options = {"experiment_name": "x", "batch_size": 4, "epochs": 2, "keep_last": 2, "ema_decay": 0.9}
    model = build("simple_cnn", num_classes=3, in_channels=1, image_size=6)
    model.describe(task="classification", classes=["a", "b", "c"], image_size=6, mean=(0.0,), std=(1.0,))
    tiny_trainer(folder, batches, batches, model=model, **options).train()
    return folder / "x"


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "x"))


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def write_manifest(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    manifest = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def put_into_weights(file: Path, value: float) -> None:
    tensors = load_file(file)
    tensors["head.bias"][1] = value
    save_file(tensors, file, metadata={"format": "pt"})


def verdicts(capsys, *paths: Path) -> tuple[int, dict[str, str]]:
    """The exit code, and what is said of each folder."""
    code = verify.main([str(path) for path in paths])
    said = capsys.readouterr()
    assert not said.err
    assert all(len(line) <= 80 for line in said.out.splitlines() if " MB  " in line)
    return code, {line.split()[0]: line.split(" MB  ")[1] for line in said.out.splitlines() if " MB  " in line}


def test_a_sound_run_holds_and_nothing_is_changed(run, capsys):
    def contents() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}

    before = contents()
    assert verdicts(capsys, run) == (0, {"step_00000002": "ok", "step_00000004": "ok", "best": "ok"})
    assert contents() == before


def test_sizes_are_in_megabytes(run, capsys):
    others = sum(path.stat().st_size for path in (run / "best").iterdir())
    (run / "best" / "padding").write_bytes(bytes(12_340_000 - others))
    verify.main([str(run)])
    assert " 12.3 MB  ok" in capsys.readouterr().out.splitlines()[-1]


def test_a_flipped_bit_or_a_cut_off_end_is_named_wherever_it_is(run, capsys):
    """In each file in turn."""
    draw = random.Random(0)
    checkpoint = newest(run)
    files = sorted(checkpoint.iterdir())
    assert len(files) == 6
    for number in range(FLIPS + TRUNCATIONS):
        file = files[number % len(files)]
        sound = file.read_bytes()
        place = draw.randrange(len(sound))
        if number < FLIPS:
            broken = sound[:place] + bytes([sound[place] ^ 1 << draw.randrange(8)]) + sound[place + 1 :]
        else:
            broken = sound[:place]
        file.write_bytes(broken)
        code, said = verdicts(capsys, checkpoint)
        assert code == 1, (file.name, place, number)
        assert file.name == MANIFEST or file.name in said[checkpoint.name]
        file.write_bytes(sound)
    assert verdicts(capsys, checkpoint) == (0, {checkpoint.name: "ok"})


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "state.json", MANIFEST])
def test_a_missing_file_is_named(run, capsys, name):
    (newest(run) / name).unlink()
    code, said = verdicts(capsys, run)
    assert code == 1
    assert name in said["step_00000004"]
    assert said["step_00000002"] == said["best"] == "ok"


def test_a_file_that_the_manifest_does_not_list_is_named(run, capsys):
    (newest(run) / "random_states_0.pkl").write_bytes(b"")
    code, said = verdicts(capsys, run)
    assert code == 1
    assert "random_states_0.pkl" in said["step_00000004"]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(run, capsys, name, value):
    put_into_weights(newest(run) / name, value)
    write_manifest(newest(run))
    code, said = verdicts(capsys, run)
    assert (code, said["step_00000004"]) == (1, f"{name}: head.bias is not finite")
    assert said["step_00000002"] == said["best"] == "ok"


def test_half_precision_whole_numbers_and_empty_tensors_are_checked_too(tmp_path):
    sound = {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "seen": torch.tensor(7),
        "none": torch.ones(0),
        "mask": torch.tensor([True]),
    }
    save_file(sound, tmp_path / "sound.safetensors")
    save_file(sound | {"half": torch.tensor([1, torch.nan]).bfloat16()}, tmp_path / "broken.safetensors")
    assert verify.tensor_fault(tmp_path / "sound.safetensors") is None
    assert verify.tensor_fault(tmp_path / "broken.safetensors") == "broken.safetensors: half is not finite"


def test_a_checkpoint_under_the_name_of_another_step_is_named(run, capsys):
    newest(run).rename(run / "checkpoints" / "step_00000009")
    code, said = verdicts(capsys, run)
    assert (code, said["step_00000009"]) == (1, "state.json is of step 4")


@pytest.mark.parametrize("state", ["[]", "{}", "4", "null", "{"])
def test_a_state_that_holds_no_step_is_named(run, capsys, state):
    (newest(run) / "state.json").write_text(state)
    write_manifest(newest(run))
    code, said = verdicts(capsys, run)
    assert code == 1
    assert said["step_00000004"].startswith("state.json cannot be read")


def test_a_best_model_that_cannot_be_used_is_named(run, capsys):
    def said_of_best() -> str:
        code, said = verdicts(capsys, run)
        assert code == 1
        assert said["step_00000002"] == said["step_00000004"] == "ok"
        return said["best"]

    weights, config = run / "best" / "model.safetensors", run / "best" / "config.json"
    sound, sound_config = weights.read_bytes(), config.read_text()
    put_into_weights(weights, float("nan"))
    assert said_of_best() == "model.safetensors: head.bias is not finite"
    weights.write_bytes(sound[:-1])
    assert said_of_best().startswith("model.safetensors cannot be read")
    weights.unlink()
    assert said_of_best() == "there are no weights"
    weights.write_bytes(sound)
    for text in (
        "{",
        "{}",
        "[]",
        sound_config.replace('"simple_cnn"', '"no_such_net"'),
        sound_config.replace("0.0", "["),
    ):
        config.write_text(text)
        assert said_of_best().startswith("cannot be loaded")


def test_what_is_no_checkpoint_is_passed_over(run, capsys):
    for name in (".step_00000006", "set_aside_step_00000006", "notes"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step_00000007").write_text("a file")
    assert verdicts(capsys, run)[0] == 0


def test_a_run_without_checkpoints_holds(run, capsys):
    for folder in ("checkpoints", "best"):
        shutil.rmtree(run / folder)
    assert verify.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: no checkpoints yet\n"


def test_the_command_tells_of_each_run_and_refuses_what_is_none(run, tmp_path):
    shutil.copytree(run, tmp_path / "broken")
    (newest(tmp_path / "broken") / "optimizer.bin").write_bytes(b"")
    said = run_script("verify.py", run, tmp_path / "broken", rc=1)
    lines = said.stdout.splitlines()
    names = ["step_00000002", "step_00000004", "best"]
    assert [line.split(" ")[0] for line in lines] == [str(run), *names, str(tmp_path / "broken"), *names]
    assert [line.endswith(" MB  ok") for line in lines] == [False, True, True, True, False, True, False, True]
    assert "optimizer.bin has 0 bytes instead of" in lines[-2]
    assert said.stderr == ""
    said = run_script("verify.py", run, tmp_path, rc=2)
    assert said.stdout == ""
    assert said.stderr.splitlines()[:2] == ["error: this is neither a run nor a checkpoint", f"  where: {tmp_path}"]
