"""What only a GPU can show: the same numbers as elsewhere, and a run that comes back."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs.arguments import make_config
from configs.errors import Diverged
from data.dataset import load_data
from data.loader import train_loader
from tests.conftest import lines_of, run_script, same_run
from tests.gpu import NEEDS_BF16, NEEDS_GPU
from tests.test_nonfinite import BAD_STEP, BatchNormNet, batches_with, by_hand, trainer_of
from tests.tiny import TinyNet, distance, tiny_batches, tiny_trainer, weights
from trainer import checkpoint
from trainer.device import moved_ahead
from trainer.main_trainer import MainTrainer

pytestmark = NEEDS_GPU

PLAIN = {"batch_size": 8, "lr": 0.1, "optimizer": "sgd"}
BF16 = pytest.param("bf16", torch.bfloat16, marks=NEEDS_BF16)

# ---- the same numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TinyNet, BatchNormNet])
@pytest.mark.parametrize("options", [{}, {"mixup": 0.2, "cutmix": 1.0, "grad_clip": 0.1, "ema_decay": 0.9}])
def test_a_step_is_that_of_the_cpu(tmp_path, monkeypatch, model, options):
    batches = tiny_batches([8])
    gpu = tiny_trainer(tmp_path, batches, model=model(), **PLAIN, **options)
    start = weights(gpu).cpu()
    found = gpu.train_epoch(batches) | gpu.validate_epoch(batches)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cpu = tiny_trainer(tmp_path, batches, model=model(), **PLAIN, **options)
    assert (gpu.device.type, cpu.device.type) == ("cuda", "cpu")
    assert found == pytest.approx(cpu.train_epoch(batches) | cpu.validate_epoch(batches), rel=1e-5)
    assert distance(weights(cpu), start) > 1e-3
    assert distance(weights(gpu).cpu(), weights(cpu)) < 1e-5


class Seen(MainTrainer):
    """Notes the dtypes of what the body, the model and the loss give."""

    def forward_pass(self, batch):
        losses, predictions = super().forward_pass(batch)
        self.dtypes = losses.dtype, predictions.dtype
        return losses, predictions


@pytest.mark.parametrize(("precision", "dtype"), [BF16, ("fp16", torch.float16)])
def test_mixed_precision_learns_with_outputs_and_losses_in_float32(tmp_path, precision, dtype):
    batches, inside = tiny_batches([16]), set()
    options = {"batch_size": 16, "lr": 0.05, "epochs": 150, "mixed_precision": precision}
    trainer = tiny_trainer(tmp_path, batches, batches, trainer=Seen, **options)
    trainer.plain_model.body.register_forward_hook(lambda module, inputs, output: inside.add(output.dtype))
    assert trainer.train()["best"]["value"] > 0.9
    assert trainer.dtypes == (torch.float32, torch.float32)
    assert inside == {dtype}
    assert (trainer.scaler is not None) == (precision == "fp16")


@pytest.mark.parametrize("options", [{"channels_last": True}, {"channels_last": True, "compile": True}])
def test_channels_last_and_compile_change_speed_alone(tmp_path, options):
    batches = tiny_batches([8] * 4)
    for name, given in (("plain", {}), ("fast", options)):
        run = {**PLAIN, "lr": 0.01, "log_every": 1, "experiment_name": name, **given}
        tiny_trainer(tmp_path, batches, batches, model=BatchNormNet(), **run).train()
    plain, fast = (lines_of(tmp_path / name, "train", "val") for name in ("plain", "fast"))
    assert [line["loss"] for line in fast] == pytest.approx([line["loss"] for line in plain], rel=1e-3)
    files = [checkpoint.all_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("plain", "fast")]
    assert load_file(files[0] / "model.safetensors").keys() == load_file(files[1] / "model.safetensors").keys()


def test_what_travels_ahead_on_its_own_stream_arrives_whole(tmp_path):
    """While the device computes, so that a batch that is used too early would not be there."""
    config = make_config(batch_size=64, num_workers=2)
    loader, trainer = train_loader(config, load_data(config)), tiny_trainer(tmp_path, tiny_batches([8]), **PLAIN)
    loader.set_position(0, 0)
    expected = list(loader)
    assert all(batch["images_BCHW"].is_pinned() for batch in expected)
    busy, sums = torch.randn(2048, 2048, device=trainer.device), []
    loader.set_position(0, 0)
    for batch in moved_ahead(loader, trainer.device, trainer.on_device):
        busy = (busy @ busy).tanh()
        sums.append({name: tensor.double().sum((*range(1, tensor.ndim),)) for name, tensor in batch.items()})
    assert len(sums) == len(expected)
    for found, batch in zip(sums, expected):
        for name, tensor in batch.items():
            assert torch.equal(found[name].cpu(), tensor.double().sum((*range(1, tensor.ndim),))), name


# ---- coming back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=NEEDS_BF16), "fp16"])
def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path, precision):
    """With fp16 also the scale of the loss, which here grows every three steps."""
    options = {**PLAIN, "momentum": 0.9, "ema_decay": 0.9, "deterministic": True, "mixed_precision": precision}
    trainers = []
    for name, stop in (("whole", None), ("parts", 7), ("parts", None)):
        run = {**options, "experiment_name": name, "log_every": 1, "stop_after_steps": stop}
        trainers.append(tiny_trainer(tmp_path, tiny_batches([8] * 12), model=BatchNormNet(), **run))
        if trainers[-1].scaler is not None:
            trainers[-1].scaler.set_growth_interval(3)
        trainers[-1].train()
    whole, _, resumed = trainers
    assert torch.equal(weights(whole), weights(resumed))
    assert lines_of(whole.run.path) == lines_of(resumed.run.path)
    if precision == "fp16":
        assert whole.scaler.get_scale() != 65536
        assert whole.scaler.state_dict() == resumed.scaler.state_dict()


@NEEDS_BF16
def test_a_real_run_goes_on_in_a_fresh_process_to_the_last_bit(tmp_path):
    flags = (
        "--epochs 1 --batch_size 96 --micro_batch_size 32 --mixup 0.2 --cutmix 1.0 --ema_decay 0.99 --grad_clip "
        "--warmup_steps 5 --trace_samples --mixed_precision bf16 --channels_last --deterministic --cpu_threads 1"
    ).split()
    for name, more, rc in (("whole", [], 0), ("parts", ["--stop_after_steps", "6"], 75), ("parts", [], 0)):
        run_script("train.py", "--output_dir", tmp_path, "--experiment_name", name, *flags, *more, rc=rc)
    same_run(tmp_path / "whole", tmp_path / "parts")


# ---- losses and gradients that are not finite -------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "steps"),
    [("stop", [1, 2, 3, 4, 5, 7, 8]), ("skip", [1, 2, 3, 4, 5, 7, 8, 9, 10]), ("rollback", [1, 2, 3, 4, 9, 10])],
)
def test_what_is_not_finite_moves_no_weight_before_the_host_looks(tmp_path, policy, steps):
    """It looks at log lines: BAD_STEP is 6, the next line that of step 8, the last checkpoint that of step 4."""
    trainer = trainer_of(tmp_path, math.nan, nonfinite=policy)
    assert not trainer.nonfinite.looks_at_once
    if policy == "stop":
        with pytest.raises(Diverged, match=f"at step {BAD_STEP} "):
            trainer.train()
    else:
        trainer.train()
        assert lines_of(trainer.run.path, "nonfinite")[0]["step"] == BAD_STEP
    torch.testing.assert_close(weights(trainer).cpu(), by_hand(steps), rtol=1e-4, atol=1e-5)


def test_running_statistics_and_their_averages_are_put_back(tmp_path):
    options = {**PLAIN, "batch_size": 4, "nonfinite": "skip", "ema_decay": 0.9, "log_every": 4}
    trainer = tiny_trainer(tmp_path, batches_with(math.nan), model=BatchNormNet(), **options)
    assert trainer.train()["state"] == "done"
    assert trainer.state.nonfinite_steps == 1
    for folder in checkpoint.all_checkpoints(trainer.run.checkpoints):
        for file in ("model.safetensors", "ema.safetensors"):
            assert all(
                value.isfinite().all() for value in load_file(folder / file).values() if value.is_floating_point()
            )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_too_large_for_fp16_lowers_the_scale_and_moves_nothing(tmp_path, optimizer):
    options = {**PLAIN, "optimizer": optimizer, "mixed_precision": "fp16", "log_every": 1}
    trainer = tiny_trainer(tmp_path, tiny_batches([8]), **options)
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | {"scale": 2.0**40})
    start = weights(trainer).clone()
    assert trainer.train()["state"] == "done"
    assert torch.equal(weights(trainer), start)
    assert trainer.scaler.get_scale() == 2.0**39
    assert trainer.state.nonfinite_steps == 0
    for state in trainer.optimizers[0].state.values():
        assert all(not value.any() for value in state.values()), state.keys()
