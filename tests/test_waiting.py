"""What would wait for a GPU, seen on a CPU: operations whose result the host has to know. tests/test_gpu.py sees
copies, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_nonfinite import BatchNormNet
from tests.tiny import tiny_batches, tiny_trainer
from trainer.main_trainer import MainTrainer
from trainer.metrics import ClassificationMetrics

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.bincount, aten.masked_select, aten.equal, aten.unique_dim}


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function in (aten.index.Tensor, aten.index_put_.default) else []
        masked = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if masked or function.overloadpacket in WAITS:
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


class Watched(MainTrainer):
    """From the second step on, but for what follows a step that is logged."""

    watched_steps = 0
    watch: NoWaiting | None = None

    def micro_batches(self, window):
        if self.state.step:
            self.watch = NoWaiting()
            self.watch.__enter__()
        yield from super().micro_batches(window)

    def after_step(self, bar):
        logs = self.state.step % self.config.log_every == 0
        if self.watch is not None and not logs:
            self.watched_steps += 1
            stops = super().after_step(bar)
            self.stop_watching()
            return stops
        self.stop_watching()
        return super().after_step(bar)

    def stop_watching(self) -> None:
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
            self.watch = None


def without_looking(labels_B: Tensor, num_classes: int) -> Tensor:
    """one_hot, which looks at what it is given on a CPU alone."""
    return (labels_B[:, None] == torch.arange(num_classes)).long()


@pytest.mark.parametrize(
    "options",
    [
        {"micro_batch_size": 4, "grad_clip": 1.0, "ema_decay": 0.9},
        {"optimizer": "sgd", "mixup": 0.2, "cutmix": 1.0},
        {"nonfinite": "skip", "optimizer": "adam"},
    ],
)
def test_no_step_between_two_log_lines_waits(tmp_path, monkeypatch, options):
    monkeypatch.setattr(nn.functional, "one_hot", without_looking)
    given = {"batch_size": 8, "log_every": 4, "experiment_name": "x", **options}
    batches = tiny_batches([options.get("micro_batch_size", 8)] * 12 * (8 // options.get("micro_batch_size", 8)))
    trainer = tiny_trainer(tmp_path, batches, trainer=Watched, model=BatchNormNet(), **given)
    trainer.nonfinite.looks_at_once = False  # as with CUDA
    try:
        trainer.train()
    finally:
        trainer.stop_watching()
    assert trainer.state.step == 12
    assert trainer.watched_steps == 8  # 2, 3, 5, 6, 7, 9, 10 and 11


def test_counting_an_evaluations_batches_waits_for_nothing():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 7, generator=generator), torch.randint(0, 7, (40,), generator=generator)
    metrics = ClassificationMetrics(7, torch.device("cpu"))
    with NoWaiting():
        for part in (slice(0, 16), slice(16, 40)):
            metrics.update(logits[part], {"labels": labels[part]})
    assert metrics.counts.sum(1).tolist() == [
        (logits.argmax(1) == labels).sum().item(),
        sum(label in row.topk(5).indices for row, label in zip(logits, labels)),
        40,
        40,
    ]
