"""The loop against reference values computed by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from configs.errors import ConfigError, Diverged, UserError
from tests.conftest import ROOT, lines_of
from tests.tiny import TinyNet, distance, tiny_batches, tiny_trainer, weights
from trainer import checkpoint, reporting
from trainer.main_trainer import MainTrainer


def split_up(batch, size):
    return list(zip(*(part.split(size) for part in batch)))


@pytest.mark.parametrize(
    "options", [{"optimizer": "sgd"}, {"optimizer": "adamw", "grad_clip": 0.1, "label_smoothing": 0.1}]
)
def test_four_micro_batches_equal_one_batch(tmp_path, options):
    (batch,) = tiny_batches([32])
    whole = tiny_trainer(tmp_path, [batch], batch_size=32, lr=0.1, **options)
    parts = tiny_trainer(tmp_path, split_up(batch, 8), batch_size=32, lr=0.1, **options)
    start = weights(whole)
    results = [trainer.train_epoch(trainer.train_loader) for trainer in (whole, parts)]
    assert whole.state.step == parts.state.step == 1
    assert distance(weights(whole), start) > 1e-3
    assert distance(weights(parts), weights(whole)) < 1e-6
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
    assert results[1]["accuracy"] == results[0]["accuracy"]


def test_the_end_of_another_process_is_written_down_without_asking_the_device(tmp_path, monkeypatch):
    """It may be waiting for that process, for ever."""

    class Orphan(MainTrainer):
        def forward_pass(self, batch):
            raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.setattr(reporting, "where_it_is", lambda trainer: pytest.fail("it asks the device for sample ids"))
    trainer = tiny_trainer(tmp_path, tiny_batches([4]), trainer=Orphan, batch_size=4, experiment_name="x")
    with pytest.raises(RuntimeError, match="closed by peer"):
        trainer.train()
    status = json.loads((tmp_path / "x" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "another process has ended")


def test_gradients_meet_in_the_last_micro_batch_alone(tmp_path, monkeypatch):
    """The forward and the backward of the others are inside of no_sync."""
    trainer = tiny_trainer(tmp_path, tiny_batches([2] * 8), batch_size=8)
    silent, seen = [], []

    @contextmanager
    def no_sync(model):
        silent.append(model)
        yield
        silent.pop()

    monkeypatch.setattr(trainer.accelerator, "no_sync", no_sync)
    trainer.plain_model.head.register_forward_hook(lambda *_: seen.append(bool(silent)))
    trainer.plain_model.head.register_full_backward_hook(lambda *_: seen.append(bool(silent)))
    trainer.train_epoch(trainer.train_loader)
    assert seen == ([True] * 6 + [False] * 2) * 2


def test_the_tail_window_of_an_accumulation_weighs_right(tmp_path):
    """10 batches of 4 in windows of 16, the last of 8 samples: two SGD steps by hand."""
    batches = tiny_batches([4] * 5 + [3])
    trainer = tiny_trainer(tmp_path, batches, batch_size=16, optimizer="sgd", momentum=0.0, lr=0.1)
    reference = TinyNet()
    for window in (batches[:4], batches[4:]):
        images, labels = (torch.cat(parts) for parts in zip(*window))
        nn.functional.cross_entropy(reference(images), labels).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    trainer.train_epoch(batches)
    assert trainer.state.step == trainer.steps_per_epoch == 2
    assert distance(weights(trainer), torch.cat([p.detach().flatten() for p in reference.parameters()])) < 1e-6


def test_the_update_is_that_of_a_hand_written_loop(tmp_path):
    batches = tiny_batches([8] * 12)
    options = {"optimizer": "adamw", "lr": 0.01, "grad_clip": 0.5, "weight_decay": 0.1, "scheduler": "cosine"}
    trainer = tiny_trainer(tmp_path, batches, batch_size=8, warmup_steps=3, ema_decay=0.5, **options)
    trainer.train_epoch(batches)
    model = TinyNet()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 1.0, 2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for step, (images, labels) in enumerate(batches):
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        (warmup if step < 2 else cosine).step() if step != 2 else None
    assert distance(weights(trainer), torch.cat([p.detach().flatten() for p in model.parameters()])) < 1e-5


def test_a_trainer_overfits_one_batch(tmp_path):
    batch = tiny_batches([16])
    trainer = tiny_trainer(tmp_path, batch, batch, batch_size=16, lr=0.05, epochs=150)
    assert trainer.train()["best"]["value"] == 1.0
    assert lines_of(trainer.run.path, "val")[-1]["loss"] < 0.1
    probabilities = trainer.inference(batch[0][0])
    assert torch.equal(probabilities.argmax(1), batch[0][1])
    assert torch.allclose(probabilities.sum(1), torch.ones(16))


def test_loaders_can_be_lists_generators_and_torch_loaders(tmp_path):
    batches = tiny_batches([8] * 6)
    dataset = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8)
    trained = []
    for train in (batches, loader, (batch for batch in batches)):
        trainer = tiny_trainer(tmp_path, train, batch_size=8, max_steps=6)
        trainer.train_epoch(train)
        trained.append(weights(trainer))
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], trained[2])
    trainer.validate_epoch(loader)
    with pytest.raises(ConfigError, match="--max_steps"):
        tiny_trainer(tmp_path, iter(batches), batch_size=8)


def test_logged_losses_are_means_over_samples_whatever_the_accumulation(tmp_path):
    batches = tiny_batches([8] * 10)
    logged = []
    for name, train in (("whole", batches), ("parts", [part for batch in batches for part in split_up(batch, 3)])):
        trainer = tiny_trainer(
            tmp_path, train, batch_size=8, log_every=3, lr=0.01, experiment_name=name, optimizer="sgd", monitor="loss"
        )
        trainer.train()
        logged.append(lines_of(trainer.run.path, "train"))
    assert [line["step"] for line in logged[0]] == [1, 3, 6, 9]
    for whole, parts in zip(*logged):
        assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)
        assert whole["accuracy"] == parts["accuracy"]


class TwoLosses(MainTrainer):
    def get_criterion(self):
        self.loss_weights = {"hard": 1.0, "soft": 0.5}
        return {"hard": nn.CrossEntropyLoss(), "soft": nn.CrossEntropyLoss(label_smoothing=0.5)}


def test_every_part_of_a_loss_is_logged_by_name(tmp_path):
    batches = tiny_batches([8] * 4)
    trainer = tiny_trainer(tmp_path, batches, batches, trainer=TwoLosses, batch_size=8)
    trainer.train()
    for line in lines_of(trainer.run.path, "train", "val"):
        assert line["loss"] == pytest.approx(line["loss/hard"] + 0.5 * line["loss/soft"], rel=1e-5)


def test_evaluation_equals_one_forward_pass_over_everything(tmp_path):
    batches = tiny_batches([8, 8, 3])
    trainer = tiny_trainer(tmp_path, batches, batch_size=8)
    metrics = trainer.validate_epoch(batches)
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    logits = TinyNet()(images)
    assert metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["accuracy"] == (logits.argmax(1) == labels).double().mean().item()


def test_early_stopping_and_the_best_follow_the_monitor(tmp_path):
    batches = tiny_batches([8] * 2)
    trainer = tiny_trainer(
        tmp_path, batches, batches, batch_size=8, epochs=30, lr=0.0, early_stopping=True, patience=3, monitor="loss"
    )
    result = trainer.train()
    assert result["epoch"] == 4  # the first is best, then three without improvement
    assert result["best"]["epoch"] == 0


def test_plateau_lowers_the_rate_after_evaluations_without_improvement(tmp_path):
    batches = tiny_batches([8] * 2)
    options = {"batch_size": 8, "epochs": 7, "min_delta": 100.0, "scheduler": "plateau", "decay_epochs": 2}
    trainer = tiny_trainer(
        tmp_path, batches, batches, lr=0.01, decay_factor=0.5, log_every=1, monitor="loss", **options
    )
    trainer.train()
    rates = {line["epoch"]: line["lr"] for line in lines_of(trainer.run.path, "train")}
    assert [rates[epoch] for epoch in range(7)] == [0.01, 0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]


def test_checkpoints_kept_are_the_newest_and_the_best(tmp_path):
    batches = tiny_batches([8] * 2)
    trainer = tiny_trainer(
        tmp_path, batches, batches, batch_size=8, epochs=6, lr=0.0, keep_last=2, keep_best=1, monitor="loss"
    )
    trainer.train()
    assert sorted(folder.name for folder in trainer.run.checkpoints.iterdir()) == [
        "step_00000002",
        "step_00000010",
        "step_00000012",
    ]


def test_a_loss_of_nan_stops_the_run_and_saves_nothing_of_it(tmp_path):
    batches = tiny_batches([8] * 6)
    batches[3][0][0, 0, 0, 0] = float("nan")
    trainer = tiny_trainer(
        tmp_path, batches, batches, batch_size=8, log_every=2, save_every_steps=2, experiment_name="x"
    )
    with pytest.raises(Diverged, match="loss is nan at step 4"):
        trainer.train()
    assert json.loads((tmp_path / "x" / "status.json").read_text())["state"] == "diverged"
    assert [folder.name for folder in (tmp_path / "x" / "checkpoints").glob("step_*")] == ["step_00000002"]


def test_a_micro_batch_that_is_not_finite_is_told_with_its_own_step(tmp_path):
    batches = tiny_batches([4] * 6)
    batches[2][0][0, 0, 0, 0] = float("nan")  # the first of the two of step 2
    trainer = tiny_trainer(tmp_path, batches, batch_size=8, experiment_name="x", monitor="loss")
    with pytest.raises(Diverged, match="loss is nan at step 2"):
        trainer.train()
    capsule = json.loads((tmp_path / "x" / "nonfinite" / "step_00000002.json").read_text())
    first, second = capsule["losses"]["loss"]
    assert first == "nan"
    assert float(second) > 0


def test_a_metric_that_does_not_exist_is_refused_before_the_first_step(tmp_path):
    batches = tiny_batches([8])
    trainer = tiny_trainer(tmp_path, batches, batches, batch_size=8, monitor="acuracy")
    with pytest.raises(ConfigError, match="--monitor acuracy") as error:
        trainer.train()
    assert "accuracy" in str(error.value)
    assert trainer.state.step == 0


def test_no_train_loader_is_an_error_with_its_cure(tmp_path):
    with pytest.raises(UserError, match="no train_loader"):
        tiny_trainer(tmp_path, None).train()


def test_bf16_computes_in_half_precision_and_fp16_is_refused_without_a_gpu():
    code = """
import sys, torch, tempfile
from tests.tiny import *
if sys.argv[1] == "fp16" and torch.cuda.is_available():
    from configs.errors import ConfigError
    raise ConfigError("fp16 works here")
trainer = tiny_trainer(tempfile.mkdtemp(), tiny_batches([8] * 4), batch_size=8, mixed_precision=sys.argv[1])
seen = []
trainer.plain_model.body.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
trainer.train_epoch(trainer.train_loader)
assert seen[0] == torch.bfloat16, seen
assert trainer.plain_model.head.weight.dtype == torch.float32
"""
    for precision, rc, words in (("bf16", 0, ""), ("fp16", 1, "fp16")):
        done = subprocess.run([sys.executable, "-c", code, precision], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == rc, done.stderr
        assert words in done.stderr


@pytest.mark.long
def test_a_compiled_model_trains_alike_and_saves_clean_names(tmp_path):
    batches = tiny_batches([8] * 4)
    plain, compiled = (
        tiny_trainer(tmp_path / str(c), batches, batches, batch_size=8, compile=c) for c in (False, True)
    )
    for trainer in (plain, compiled):
        trainer.train()
    assert distance(weights(compiled), weights(plain)) < 1e-4
    assert list(compiled.plain_model.state_dict()) == list(plain.plain_model.state_dict())


def test_a_loader_that_ends_early_begins_a_new_epoch_and_an_empty_one_is_an_error(tmp_path):
    batches = tiny_batches([8] * 3)
    dataset = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches)))
    places = [list(range(place, place + 8)) for place in (0, 8, 16)]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=places)
    trainer = tiny_trainer(tmp_path, loader, batch_size=8, max_steps=7)
    assert trainer.train()["step"] == 7
    assert [line["epoch"] for line in lines_of(trainer.run.path, "epoch")] == [0, 1, 2]
    once = tiny_trainer(tmp_path, (batch for batch in batches), batch_size=8, max_steps=7)
    with pytest.raises(UserError, match="gave no batch in epoch 2"):
        once.train()


def test_channels_last_saves_averages_and_computes_the_same(tmp_path):
    batches = tiny_batches([8] * 4)
    trained = []
    for last in (False, True):
        trainer = tiny_trainer(tmp_path, batches, batches, batch_size=8, channels_last=last, ema_decay=0.9)
        trainer.train()
        trained.append(weights(trainer))
        kept = [p.is_contiguous(memory_format=torch.channels_last) for p in trainer.parameters if p.ndim == 4]
        assert all(kept) == last or not last
    assert distance(trained[1], trained[0]) < 1e-5


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    batches = tiny_batches([8] * 2)
    trainer = tiny_trainer(
        tmp_path, batches, batches, batch_size=8, lr=1e38, optimizer="sgd", save_every_steps=1, experiment_name="x"
    )
    with pytest.raises(Diverged):
        trainer.train()
    for file in (tmp_path / "x" / "checkpoints").glob("step_*/model.safetensors"):
        from safetensors.torch import load_file

        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_training_goes_on_from_where_it_is_when_called_again(tmp_path):
    batches = tiny_batches([8] * 2)
    options = {"batch_size": 8, "epochs": 3, "experiment_name": "x"}
    tiny_trainer(tmp_path, batches, batches, stop_after_steps=2, **options).train()
    trainer = tiny_trainer(tmp_path, batches, batches, **options)
    trainer.train()
    end = weights(trainer)
    assert trainer.train()["step"] == 6
    assert torch.equal(weights(trainer), end)


def test_what_only_the_loaders_tell_is_checked_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="--warmup_steps 5 must be less than the run's 4 steps"):
        tiny_trainer(tmp_path, tiny_batches([8] * 4), batch_size=8, warmup_steps=5)
    trainer = tiny_trainer(tmp_path, tiny_batches([8] * 4), trainer=TwoLosses, batch_size=8, monitor="loss/hrd")
    with pytest.raises(ConfigError, match="loss/hrd") as error:
        trainer.train()
    assert "loss/hard" in str(error.value)


class Drawing(MainTrainer):
    def forward_pass(self, batch):
        self.drawn = [*getattr(self, "drawn", []), torch.rand(()).item()]
        return super().forward_pass(batch)


def test_each_micro_batch_draws_numbers_of_its_own_that_follow_from_the_seed(tmp_path):
    batches = tiny_batches([4] * 8)
    drawn = []
    for seed in (0, 0, 1):
        trainer = tiny_trainer(tmp_path, batches, trainer=Drawing, batch_size=8, seed=seed)
        trainer.train_epoch(batches)
        drawn.append(trainer.drawn)
    assert len(set(drawn[0])) == 8  # four steps of two micro-batches
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_mixing_in_micro_batches_equals_mixing_in_one_batch(tmp_path):
    (batch,) = tiny_batches([32])
    options = {"batch_size": 32, "lr": 0.1, "optimizer": "sgd", "mixup": 0.4, "cutmix": 1.0}
    whole = tiny_trainer(tmp_path, [batch], **options)
    parts = tiny_trainer(tmp_path, split_up(batch, 8), **options)
    for trainer in (whole, parts):
        trainer.train_epoch(trainer.train_loader)
    assert distance(weights(parts), weights(whole)) < 1e-6


def test_the_averaged_weights_are_judged_used_and_kept_as_best(tmp_path):
    batches = tiny_batches([8] * 4)
    trainer = tiny_trainer(tmp_path, batches, batches, batch_size=8, lr=0.05, ema_decay=0.9, monitor="loss")
    trainer.train()
    best = TinyNet.from_pretrained(trainer.run.best)
    assert all(torch.equal(best.state_dict()[name], value) for name, value in trainer.ema.state_dict().items())
    assert distance(weights(trainer), torch.cat([p.detach().flatten() for p in best.parameters()])) > 1e-3
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    logits = best(images).detach()
    (val,) = lines_of(trainer.run.path, "val")
    assert val["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert torch.allclose(trainer.inference(images), logits.softmax(1), atol=1e-6)


def test_label_smoothing_is_part_of_the_loss(tmp_path):
    batches = tiny_batches([8])
    trainer = tiny_trainer(tmp_path, batches, batch_size=8, label_smoothing=0.3)
    images, labels = batches[0]
    expected = nn.functional.cross_entropy(TinyNet()(images), labels, label_smoothing=0.3).item()
    assert trainer.train_epoch(batches)["loss"] == pytest.approx(expected, rel=1e-6)


def test_mixing_ends_at_its_epoch_and_spares_the_evaluation(tmp_path):
    batches = tiny_batches([8] * 2)
    options = {"batch_size": 8, "epochs": 2, "lr": 0.0, "mixup": 1.0, "mix_off_epoch": 1}
    trainer = tiny_trainer(tmp_path, batches, batches, **options)
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    plain = nn.functional.cross_entropy(TinyNet()(images), labels).item()
    trainer.train()
    first, second = (line["loss"] for line in lines_of(trainer.run.path, "epoch"))
    assert second == pytest.approx(plain, rel=1e-5)
    assert abs(first - plain) > 1e-3
    assert [line["loss"] for line in lines_of(trainer.run.path, "val")] == pytest.approx([plain] * 2, rel=1e-5)


@pytest.mark.parametrize(("mode", "best", "kept"), [(None, 5, [10, 12]), ("max", 0, [2, 4, 12])])
def test_the_best_and_its_checkpoints_follow_the_direction_of_the_monitor(tmp_path, mode, best, kept):
    batches = tiny_batches([8] * 2)
    options = {"batch_size": 8, "epochs": 6, "lr": 0.01, "keep_last": 1, "keep_best": 2}
    trainer = tiny_trainer(tmp_path, batches, batches, monitor="loss", monitor_mode=mode, **options)
    result = trainer.train()
    losses = [line["loss"] for line in lines_of(trainer.run.path, "val")]
    assert losses == sorted(losses, reverse=True)
    assert result["best"]["epoch"] == best
    assert [checkpoint.step_of(folder) for folder in checkpoint.all_checkpoints(trainer.run.checkpoints)] == kept


@pytest.mark.parametrize(("early_stopping", "epochs"), [(True, 3), (False, 6)])
def test_a_gain_below_min_delta_is_none_and_patience_needs_its_flag(tmp_path, early_stopping, epochs):
    batches = tiny_batches([8] * 2)
    options = {"batch_size": 8, "epochs": 6, "lr": 0.01, "min_delta": 100.0, "patience": 2, "monitor": "loss"}
    trainer = tiny_trainer(tmp_path, batches, batches, early_stopping=early_stopping, **options)
    result = trainer.train()
    losses = [line["loss"] for line in lines_of(trainer.run.path, "val")]
    assert losses == sorted(losses, reverse=True)
    assert (result["epoch"], result["best"]["epoch"]) == (epochs, 0)


@pytest.mark.parametrize("last", [False, True])
def test_channels_last_reaches_weights_and_images(tmp_path, last):
    batches = [(images.repeat(1, 3, 1, 1), labels) for images, labels in tiny_batches([8] * 3)]
    trainer = tiny_trainer(tmp_path, batches, batch_size=8, model=TinyNet(in_channels=3), channels_last=last)
    body, seen = trainer.plain_model.body, []
    body.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    trainer.train_epoch(batches)
    assert seen == [last] * 3
    assert body.weight.is_contiguous(memory_format=torch.channels_last) == last


def test_deterministic_allows_deterministic_algorithms_only(tmp_path):
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        tiny_trainer(tmp_path, None, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("grad_clip", [None, 0.1])
def test_a_loss_scaler_leaves_the_update_as_it_is(tmp_path, optimizer, grad_clip):
    """fp16 needs a GPU; its scaler runs here as well, with a power of two that costs no bits."""
    batches = tiny_batches([4] * 8)
    options = {"batch_size": 8, "optimizer": optimizer, "grad_clip": grad_clip, "lr": 0.01}
    plain, scaled = (tiny_trainer(tmp_path, batches, **options) for _ in range(2))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for trainer in (plain, scaled):
        trainer.train_epoch(batches)
    assert distance(weights(scaled), weights(plain)) < 1e-6
