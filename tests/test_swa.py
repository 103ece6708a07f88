"""The mean of the weights at the ends of epochs, against means of what the epochs left."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from configs.arguments import make_config
from configs.errors import ConfigError, DataError
from models import BaseModel
from tests.conftest import lines_of
from tests.tiny import TinyNet, tiny_batches, tiny_trainer, weights
from trainer import checkpoint

BATCHES, VAL = tiny_batches([8] * 4), tiny_batches([8] * 2, seed=1)
SWA: dict[str, Any] = {
    "batch_size": 8, "epochs": 5, "optimizer": "sgd", "lr": 0.2, "swa_start_epoch": 2, "keep_last": 10, "log_every": 1,
    "scheduler": "cosine", "monitor": "loss",
}  # fmt: skip


class BatchNormNet(TinyNet):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Dropout(0.2), nn.BatchNorm2d(8))


def saved(run: Path, file: str) -> list[dict[str, torch.Tensor]]:
    """A file of the checkpoint of each epoch."""
    return [load_file(folder / file) for folder in checkpoint.all_checkpoints(run / "checkpoints")]


def mean_of(epochs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = [name for name, tensor in epochs[0].items() if tensor.is_floating_point()]
    return {name: torch.stack([epoch[name] for epoch in epochs]).mean(0) for name in names}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], within: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=within) for name in one)


def test_the_average_is_the_mean_of_the_epochs_from_the_first_one_on(tmp_path):
    trainer = tiny_trainer(tmp_path, BATCHES, VAL, experiment_name="x", **SWA)
    result = trainer.train()
    epochs, averages = (saved(trainer.run.path, file) for file in ("model.safetensors", "ema.safetensors"))
    assert len(epochs) == 5
    for epoch, average in enumerate(averages):
        assert alike(average, mean_of(epochs[2 : epoch + 1]) if epoch >= 2 else epochs[epoch])
    assert not alike(averages[4], mean_of(epochs[1:]), 1e-4)
    assert not alike(averages[4], epochs[4], 1e-4)
    assert result["best"]["epoch"] == 4
    assert alike(load_file(trainer.run.best / "model.safetensors"), averages[4])
    best = BaseModel.from_config.__func__(TinyNet, trainer.plain_model.config(), trainer.run.best / "model.safetensors")
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(best(images), labels).item() for images, labels in VAL]
    assert lines_of(trainer.run.path, "val")[4]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_learning_rate_is_constant_from_then_on(tmp_path):
    plain = tiny_trainer(tmp_path, BATCHES, VAL, experiment_name="plain", **SWA)
    constant = tiny_trainer(tmp_path, BATCHES, VAL, experiment_name="constant", **SWA, swa_lr=0.05)
    for trainer in (plain, constant):
        trainer.train()
    before, now = ([line["lr"] for line in lines_of(t.run.path, "train")] for t in (plain, constant))
    assert now == [*before[:8], *[0.05] * 12]
    assert 0.05 not in before


def test_batch_norm_has_the_statistics_of_the_mean(tmp_path):
    """Measured on the images of the epoch, without dropout; the training itself goes on as without averaging."""
    runs = {}
    for name, options in (("with", SWA), ("without", SWA | {"swa_start_epoch": None})):
        trainer = tiny_trainer(tmp_path, BATCHES, VAL, model=BatchNormNet(), experiment_name=name, **options)
        trainer.train()
        runs[name] = trainer.run.path
    epochs = saved(runs["with"], "model.safetensors")
    for one, other in zip(epochs, saved(runs["without"], "model.safetensors"), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    model = BatchNormNet()
    model.load_state_dict(mean_of(epochs[2:]), strict=False)
    norm = model.body[2].train()
    norm.reset_running_stats()
    norm.momentum = None
    model.body[1].eval()
    for images, _ in BATCHES:
        model(images)
    average = saved(runs["with"], "ema.safetensors")[-1]
    assert torch.allclose(average["body.2.running_mean"], norm.running_mean, atol=1e-6)
    assert torch.allclose(average["body.2.running_var"], norm.running_var, rtol=1e-5)
    assert not torch.allclose(average["body.2.running_var"], mean_of(epochs[2:])["body.2.running_var"], rtol=1e-2)


class Signalled(list):
    """Batches that come with a signal after `left` others, counted over all epochs."""

    left = -1

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            self.left -= 1
            yield batch


@pytest.mark.parametrize(
    ("train", "val", "step"),
    [
        (2, 99, 3),  # before averaging
        (13, 99, 12),  # in the pass that measures BatchNorm's statistics, after four batches of epoch 2
        (17, 99, 14),
        (99, 4, 12),  # in the first evaluation of the mean
        (99, 7, 16),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_average(tmp_path, train, val, step):
    def begun(name: str, train: Any = BATCHES, val: Any = VAL) -> Any:
        return tiny_trainer(tmp_path, train, val, model=BatchNormNet(), experiment_name=name, **SWA, swa_lr=0.1)

    whole = begun("whole")
    whole.train()
    batches = Signalled(BATCHES), Signalled(VAL)
    stopped = begun("part", *batches)
    for signalled, left in zip(batches, (train, val)):
        signalled.left = left  # only now: a trainer counts its batches
    assert (stopped.train()["state"], stopped.state.step) == ("preempted", step)
    back = begun("part")
    assert back.train()["state"] == "done"
    assert torch.equal(weights(back), weights(whole))
    assert all(torch.equal(back.ema.average[name], value) for name, value in whole.ema.average.items())
    assert lines_of(back.run.path) == lines_of(whole.run.path)
    assert (back.run.best / "model.safetensors").read_bytes() == (whole.run.best / "model.safetensors").read_bytes()


def test_an_epoch_that_is_cut_off_does_not_count(tmp_path):
    options = SWA | {"max_steps": 14}
    trainer = tiny_trainer(tmp_path, BATCHES, VAL, experiment_name="x", **options)
    trainer.train()
    assert (trainer.state.step, trainer.state.averaged_epochs) == (14, 1)
    epochs, averages = (saved(trainer.run.path, file) for file in ("model.safetensors", "ema.safetensors"))
    assert alike(averages[3], epochs[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"swa_start_epoch": 5}, "--swa_start_epoch 5: no epoch from this one on"),
        ({"swa_start_epoch": 2, "max_steps": 11}, "ends within the 11 steps"),
        ({"swa_start_epoch": 10**15}, "no epoch from this one on"),
        ({"ema_decay": 0.9}, "--ema_decay and --swa_start_epoch both average"),
        ({"swa_start_epoch": None, "swa_lr": 0.1}, "--swa_lr 0.1 does nothing without --swa_start_epoch"),
        ({"swa_lr": 0.0}, "--swa_lr is 0.0: it must be above 0"),
    ],
)
def test_what_averages_nothing_is_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        tiny_trainer(tmp_path, BATCHES, VAL, **(SWA | options))


def test_batches_that_come_once_cannot_be_measured_on(tmp_path):
    once = (batch for batch in BATCHES)
    options = SWA | {"swa_start_epoch": 0, "max_steps": 4}
    with pytest.raises(DataError, match="no batch to measure BatchNorm's statistics on"):
        tiny_trainer(tmp_path, once, VAL, model=BatchNormNet(), **options).train()


def test_a_config_that_asks_for_nothing_averages_nothing(tmp_path):
    assert tiny_trainer(tmp_path, BATCHES).ema is None
    assert make_config().swa_start_epoch is None
