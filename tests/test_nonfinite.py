"""Losses and gradients that are not finite: no update is made by them, and the run does what --nonfinite says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.errors import Diverged, UserError
from tests.conftest import lines_of, run_script
from tests.tiny import TinyNet, tiny_batches, tiny_trainer, weights
from trainer import checkpoint
from trainer.main_trainer import MainTrainer
from trainer.nonfinite import NonFinite

BAD_STEP = 6
PLAIN = {"batch_size": 4, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "log_every": 4, "save_every_steps": 4}


def batches_with(value: float, steps: int = 10) -> list[tuple[Tensor, Tensor]]:
    """One pixel of the batch of step BAD_STEP is spoilt."""
    batches = tiny_batches([4] * steps)
    batches[BAD_STEP - 1][0][1, 0, 2, 3] = value
    return batches


def trainer_of(folder: Path, value: float = math.nan, **options: Any) -> MainTrainer:
    return tiny_trainer(folder, batches_with(value), **(PLAIN | {"experiment_name": "x"} | options))


def by_hand(steps: list[int]) -> Tensor:
    """The weights after plain gradient descent on the batches of these steps."""
    model, batches = TinyNet(), tiny_batches([4] * 10)
    model.init_weights()
    model.train()
    for step in steps:
        images, labels = batches[step - 1]
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(autouse=True)
def one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every TinyNet begins with the same weights."""
    plain = TinyNet.__init__

    def init(self: TinyNet, *given: Any) -> None:
        plain(self, *given)
        self.init_weights()

    monkeypatch.setattr(TinyNet, "__init__", init)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_stops_before_the_update_and_saves_nothing_of_it(tmp_path, value):
    trainer = trainer_of(tmp_path, value)
    with pytest.raises(Diverged, match=f"at step {BAD_STEP} ") as error:
        trainer.train()
    assert error.value.exit_code == 3
    assert "lr 0.1" in error.value.what
    torch.testing.assert_close(weights(trainer), by_hand([1, 2, 3, 4, 5]))
    status = json.loads((trainer.run.path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("diverged", BAD_STEP)
    assert [folder.name for folder in checkpoint.all_checkpoints(trainer.run.checkpoints)] == ["step_00000004"]


def test_a_loss_that_is_not_finite_stops_the_run_though_its_gradients_are(tmp_path):
    class Odd(MainTrainer):
        def forward_pass(self, batch):
            losses, predictions = super().forward_pass(batch)
            return losses + (math.inf if self.state.step == 2 else 0.0), predictions

    trainer = tiny_trainer(tmp_path, tiny_batches([4] * 10), trainer=Odd, **PLAIN)
    with pytest.raises(Diverged, match="loss is inf at step 3 "):
        trainer.train()
    torch.testing.assert_close(weights(trainer), by_hand([1, 2]))


def test_a_skipped_step_changes_no_weight(tmp_path, capsys):
    trainer = trainer_of(tmp_path, nonfinite="skip")
    assert trainer.train()["state"] == "done"
    torch.testing.assert_close(weights(trainer), by_hand([1, 2, 3, 4, 5, 7, 8, 9, 10]))
    assert trainer.state.step == 10
    assert lines_of(trainer.run.path, "nonfinite") == [
        {"kind": "nonfinite", "step": BAD_STEP, "epoch": 0, "count": 1, "policy": "skip"}
    ]
    assert f"loss is nan at step {BAD_STEP} (lr 0.1): no update (1 of at most 10)" in capsys.readouterr().out
    assert all(math.isfinite(line["loss"]) for line in lines_of(trainer.run.path, "train", "epoch"))


def test_a_roll_back_passes_over_all_since_the_last_checkpoint(tmp_path):
    trainer = trainer_of(tmp_path, nonfinite="rollback")
    assert trainer.train()["state"] == "done"
    torch.testing.assert_close(weights(trainer), by_hand([1, 2, 3, 4, 7, 8, 9, 10]))
    assert lines_of(trainer.run.path, "nonfinite")[0]["weights_of"] == 4
    steps = [line["step"] for line in lines_of(trainer.run.path, "train")]
    assert steps == [1, 4, 8]


def test_a_save_by_the_clock_is_none_to_roll_back_to(tmp_path):
    """Else the weights would depend on how fast the machine is."""
    trainer = trainer_of(tmp_path, nonfinite="rollback", save_every_minutes=1e-9)
    trainer.train()
    torch.testing.assert_close(weights(trainer), by_hand([1, 2, 3, 4, 7, 8, 9, 10]))


def test_a_roll_back_before_the_first_save_goes_to_the_start(tmp_path):
    trainer = trainer_of(tmp_path, nonfinite="rollback", save_every_steps=None)
    trainer.train()
    torch.testing.assert_close(weights(trainer), by_hand([7, 8, 9, 10]))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("stop", [4, 5, 6, 7])
def test_a_resumed_run_knows_what_it_skipped(tmp_path, policy, stop):
    """A stop after step 5 saves there, beside step 4, which a roll back needs."""
    options = {"nonfinite": policy, "ema_decay": 0.9, "optimizer": "adamw", "max_nonfinite": 1, "lr": 0.01}
    options["keep_last"] = 1
    whole = trainer_of(tmp_path, experiment_name="whole", **options)
    whole.train()
    trainer_of(tmp_path, stop_after_steps=stop, **options).train()
    back = trainer_of(tmp_path, **options)
    back.train()
    assert torch.equal(weights(back), weights(whole))
    assert all(torch.equal(back.ema.average[name], value) for name, value in whole.ema.average.items())
    assert lines_of(back.run.path) == lines_of(whole.run.path)
    assert back.state.nonfinite_steps == 1


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path):
    trainer = trainer_of(tmp_path, nonfinite="rollback")
    batches = list(trainer.train_loader)

    def damaged():
        yield from batches[: BAD_STEP - 1]
        trainer.saver.finish()
        file = trainer.run.checkpoints / "step_00000004" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        yield from batches[BAD_STEP - 1 :]

    trainer.train_loader = damaged()
    with pytest.raises(UserError, match="the checkpoint to go back to is damaged: model.safetensors has changed"):
        trainer.train()


def test_skipping_is_bounded(tmp_path):
    batches = batches_with(math.nan)
    for step in (2, 8):
        batches[step - 1][0][0] = math.inf
    trainer = tiny_trainer(tmp_path, batches, **PLAIN, nonfinite="skip", max_nonfinite=2)
    with pytest.raises(Diverged, match="at step 8 .*, as 2 steps before; --max_nonfinite is 2"):
        trainer.train()


class BatchNormNet(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(self.body, nn.BatchNorm2d(8))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("micro", [2, 4])
def test_running_statistics_are_put_back(tmp_path, policy, micro):
    """The reference never meets the spoilt batch: it ends a step before it."""
    options = PLAIN | {"micro_batch_size": micro, "save_every_steps": 5}
    reference = tiny_trainer(
        tmp_path, tiny_batches([4] * 10), model=BatchNormNet(), experiment_name="y", stop_after_steps=5, **options
    )
    reference.train()
    trainer = tiny_trainer(
        tmp_path, batches_with(math.nan), model=BatchNormNet(), experiment_name="x", nonfinite=policy,
        stop_after_steps=6, **options
    )  # fmt: skip
    trainer.train()
    for name, buffer in reference.plain_model.named_buffers():
        if buffer.is_floating_point():
            assert torch.equal(trainer.plain_model.get_buffer(name), buffer), name


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_told_by_a_tensor_the_optimizers_do_the_same(tmp_path, optimizer):
    """What happens on a GPU: the host looks at log lines alone."""
    options = PLAIN | {"optimizer": optimizer, "lr": 0.01, "momentum": 0.9, "log_every": 10, "scheduler": "cosine"}
    options |= {"save_every_steps": 10}

    def spoilt(name: str, policy: str, *, at_once: bool) -> MainTrainer:
        batches = batches_with(math.nan)
        batches[BAD_STEP + 1][0][0] = math.nan
        trainer = tiny_trainer(tmp_path, batches, experiment_name=name, nonfinite=policy, **options)
        trainer.nonfinite.looks_at_once = at_once
        return trainer

    looked, told = spoilt("looked", "skip", at_once=True), spoilt("told", "skip", at_once=False)
    for trainer in (looked, told):
        trainer.train()
    torch.testing.assert_close(weights(told), weights(looked), rtol=0, atol=1e-6)
    assert len(lines_of(told.run.path, "nonfinite")) == 2
    assert lines_of(told.run.path, "nonfinite") == lines_of(looked.run.path, "nonfinite")
    capsules, same = (
        {file.name: json.loads(file.read_text()) for file in (trainer.run.path / "nonfinite").iterdir()}
        for trainer in (told, looked)
    )
    assert len(capsules) == 2 and capsules == same
    rates = [capsule["lr"] for capsule in capsules.values()]
    assert rates[0] != rates[1]
    stopped = spoilt("stopped", "stop", at_once=False)
    with pytest.raises(Diverged, match=f"loss is nan at step {BAD_STEP} "):
        stopped.train()
    assert weights(stopped).isfinite().all()
    assert len([*(stopped.run.path / "nonfinite").iterdir()]) == 1


def test_averages_of_running_statistics_take_in_no_bad_batch(tmp_path):
    options = PLAIN | {"nonfinite": "skip", "ema_decay": 0.9}
    trainer = tiny_trainer(tmp_path, batches_with(math.nan), model=BatchNormNet(), experiment_name="x", **options)
    assert trainer.train()["state"] == "done"
    for folder in checkpoint.all_checkpoints(trainer.run.checkpoints):
        assert all(value.isfinite().all() for value in load_file(folder / "ema.safetensors").values())


@pytest.mark.parametrize("micro", [2, 4])
def test_beside_a_loss_scaler_the_losses_of_all_micro_batches_are_looked_at(tmp_path, micro):
    """BAD_STEP's second sample is spoilt, in its first micro-batch. fp16's scaler, run on a CPU."""
    options = PLAIN | {"nonfinite": "skip", "micro_batch_size": micro, "experiment_name": "x"}
    batches = [
        pair for images, labels in batches_with(math.nan) for pair in zip(images.split(micro), labels.split(micro))
    ]
    trainer = tiny_trainer(tmp_path, batches, **options)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.nonfinite = NonFinite(trainer)
    trainer.train()
    assert trainer.state.nonfinite_steps == 1
    assert [line["step"] for line in lines_of(trainer.run.path, "nonfinite")] == [BAD_STEP]
    torch.testing.assert_close(weights(trainer), by_hand([1, 2, 3, 4, 5, 7, 8, 9, 10]))


def test_an_average_that_is_not_finite_is_never_saved(tmp_path):
    trainer = trainer_of(tmp_path, 0.0, ema_decay=0.9)
    next(iter(trainer.ema.average.values())).fill_(math.nan)
    with pytest.raises(Diverged, match="the average of .* is not finite"):
        trainer.train()


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    class Spoilt(MainTrainer):
        def after_step(self, bar: Any) -> bool:
            if self.state.step == BAD_STEP:
                with torch.no_grad():
                    self.plain_model.head.bias[0] = math.inf
            return super().after_step(bar)

    trainer = tiny_trainer(
        tmp_path, tiny_batches([4] * 10), trainer=Spoilt, experiment_name="x", **(PLAIN | {"save_every_steps": 2})
    )
    with pytest.raises(Diverged, match=r"head.bias is not finite after step 6"):
        trainer.train()
    for folder in checkpoint.all_checkpoints(trainer.run.checkpoints):
        assert all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())


def test_an_evaluation_that_is_not_finite_stops_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_batches([4] * 10), batches_with(math.nan), **PLAIN, nonfinite="skip")
    with pytest.raises(Diverged, match="loss is nan"):
        trainer.train()


def test_a_capsule_names_the_samples_and_keys(tmp_path):
    flags = [
        "--optimizer",
        "sgd",
        "--lr",
        "1e30",
        "--scheduler",
        "constant",
        "--output_dir",
        tmp_path,
        "--experiment_name",
        "x",
    ]
    said = run_script("train.py", *flags, "--trace_samples", "--log_every", "1", rc=3).stderr
    capsule = json.loads(next((tmp_path / "x" / "nonfinite").iterdir()).read_text())
    traced = [json.loads(line) for line in (tmp_path / "x" / "samples.jsonl").read_text().splitlines()]
    assert capsule["ids"] == traced[capsule["step"] - 1]["ids"]
    assert len(set(capsule["keys"])) == 32
    assert f"at step {capsule['step']} (lr 1e+30, samples {capsule['ids'][0]}, {capsule['ids'][1]}, " in said


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_first_update_that_is_skipped_leaves_no_trace(tmp_path, optimizer):
    """As fp16's first often is. Where algorithms are deterministic, torch fills what is uninitialised with NaN."""
    options = {"nonfinite": "skip", "optimizer": optimizer, "lr": 0.01, "momentum": 0.9, "log_every": 10}
    batches = tiny_batches([4] * 4)
    batches[0][0][0] = math.nan
    trainer = tiny_trainer(tmp_path, batches, experiment_name="x", deterministic=True, **(PLAIN | options))
    trainer.nonfinite.looks_at_once = False
    later = tiny_trainer(tmp_path, batches[1:], experiment_name="y", **(PLAIN | options))
    try:
        trainer.train()
    finally:
        torch.use_deterministic_algorithms(False)
    later.train()
    torch.testing.assert_close(weights(trainer), weights(later), rtol=0, atol=1e-6)
