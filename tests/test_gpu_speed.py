"""What only a GPU can show: memory, and that the loop waits for nothing."""

from __future__ import annotations

import re

import pytest
import torch

from configs.arguments import make_config
from models.model import build
from models.recompute import recompute_blocks
from models.summary import cost
from scripts import session
from scripts.report import told
from scripts.wiring import build_data, build_model, build_trainer
from tests.conftest import lines_of
from tests.gpu import NEEDS_BF16, NEEDS_GPU
from tests.tiny import tiny_trainer
from trainer import mfu, micro_batch
from trainer.device import make_accelerator
from trainer.main_trainer import MainTrainer

pytestmark = NEEDS_GPU

# ---- memory -----------------------------------------------------------------------------------------------


def test_computing_twice_needs_less_memory_for_the_same_loss(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(64, 3, 128, 128, generator=generator), torch.arange(64) % 10)]
    options = {"batch_size": 64, "optimizer": "sgd", "lr": 0.01, "deterministic": True}
    losses, peaks = [], []
    for twice in (False, True):
        torch.manual_seed(0)
        model = build("resnet50", num_classes=10, in_channels=3, image_size=128, dropout=None)
        model.classes = [str(number) for number in range(10)]
        if twice:
            recompute_blocks(model)
        trainer = tiny_trainer(tmp_path, batches * 2, model=model, **options)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses.append(trainer.train_epoch(batches * 2)["loss"])
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del trainer, model
    assert losses[0] == losses[1]
    assert peaks[1] < 0.8 * peaks[0]


@pytest.fixture
def small_memory():
    """1.5 GB more than this process has in use."""
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 1.5e9) / total))
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_largest_micro_batch_that_fits_trains_and_a_larger_one_is_told_of(tmp_path, small_memory):
    images = 3, 64, 64
    config = make_config(batch_size=4096, output_dir=str(tmp_path))
    model = build("resnet18", num_classes=10, in_channels=3, image_size=64, dropout=None)
    model.classes = [str(number) for number in range(10)]
    found = micro_batch.found_or_recorded(config, model, images, make_accelerator(config))
    assert 8 <= found < 4096
    batches = [(torch.zeros(found, *images), torch.zeros(found, dtype=torch.int64))] * 2
    trainer = tiny_trainer(tmp_path, batches, model=model, batch_size=found)
    trainer.train_epoch(batches)
    assert trainer.state.step == 2
    large = [(torch.zeros(8 * found, *images), torch.zeros(8 * found, dtype=torch.int64))]
    with pytest.raises(torch.OutOfMemoryError) as error:
        tiny_trainer(tmp_path, large, model=model, batch_size=8 * found).train_epoch(large)
    assert told(error.value).what.startswith("out of memory: ")
    assert "--micro_batch_size" in told(error.value).fix


# ---- speed ------------------------------------------------------------------------------------------------


def watched(task: type[MainTrainer]) -> type[MainTrainer]:
    """The task's trainer, for which it is an error to wait for the device between two log lines."""

    class Watched(task):  # type: ignore[misc, valid-type]
        watched_steps = 0

        def micro_batches(self, window):
            if self.state.step:  # the first may have to wait for what is made once
                torch.cuda.set_sync_debug_mode("error")
            yield from super().micro_batches(window)

        def after_step(self, bar):
            if self.state.step % self.config.log_every:
                self.watched_steps += torch.cuda.get_sync_debug_mode() == 2
            else:
                torch.cuda.set_sync_debug_mode("default")
            return super().after_step(bar)

        def new_metrics(self):
            metrics = super().new_metrics()
            update = metrics.update

            def watched_update(*given):
                torch.cuda.set_sync_debug_mode("error")
                update(*given)
                torch.cuda.set_sync_debug_mode("default")

            metrics.update = watched_update
            return metrics

    return Watched


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"grad_clip": 1.0, "ema_decay": 0.9, "mixed_precision": "bf16", "channels_last": True}, marks=NEEDS_BF16
        ),
        {"micro_batch_size": 16, "mixup": 0.2, "cutmix": 1.0},
        {"model": "resnet18", "optimizer": "sgd", "mixed_precision": "fp16", "gradient_checkpointing": True},
        {"nonfinite": "skip", "optimizer": "adam", "num_workers": 2, "augment": "trivialaugment"},
    ],
)
def test_no_step_between_two_log_lines_waits_for_the_device(tmp_path, options):
    config = make_config(
        output_dir=str(tmp_path),
        experiment_name="x",
        max_steps=20,
        log_every=10,
        batch_size=32,
        cpu_threads=1,
        **options,
    )
    trainer, _, _ = build_trainer(config, watched)
    try:
        assert trainer.train()["state"] == "done"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.watched_steps == 17  # all but the first and those of the log lines, which are 10 and 20


@NEEDS_BF16
def test_the_log_tells_memory_and_utilization(tmp_path, monkeypatch):
    """A device of 1 TFLOP/s, whatever it is."""
    name = torch.cuda.get_device_name()
    monkeypatch.setattr(mfu, "PEAKS", [(re.split(r"[ -]", name)[-1], {"bf16": 1.0})])
    monkeypatch.setattr(mfu, "OTHERS", set())
    run = {"output_dir": str(tmp_path), "experiment_name": "x", "max_steps": 5, "mixed_precision": "bf16"}
    config = make_config(model="resnet18", **run)
    assert session.run(config) == 0
    (line,) = lines_of(tmp_path / "x", "speed")
    assert 0 < line["peak_memory_bytes"] < torch.cuda.mem_get_info()[1]
    _, data, _ = build_data(config)
    flops = cost(build_model(config, data), data.info.channels, data.image_size, 32).flops
    assert line["mfu"] == pytest.approx(3 * flops * line["samples_per_second"] / 1e12, rel=1e-6)
