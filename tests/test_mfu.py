"""What share of a device's peak a run makes use of, against numbers computed by hand."""

from __future__ import annotations

import re
import time

import pytest
import torch

from configs.arguments import make_config
from models.model import build
from models.summary import cost
from scripts import session
from tests.conftest import lines_of
from tests.tiny import tiny_batches, tiny_trainer
from trainer import mfu
from trainer.main_trainer import MainTrainer


def test_resnet50_on_an_h100():
    """8.2 GFLOPs forward: 2,500 images a second take 3 x 8.2e9 x 2,500 = 61.5 of 989 TFLOP/s."""
    found = cost(build("resnet50", num_classes=1000, in_channels=3, image_size=224), 3, 224, 2)
    assert found.flops == pytest.approx(8.2e9, rel=0.01)
    peaks = mfu.peaks("NVIDIA H100 80GB HBM3", mfu.precisions("bf16", "float32"))
    assert peaks == (989e12, 989e12)
    flops = found.convolution_flops, found.flops - found.convolution_flops
    assert flops[1] == 2 * 2048 * 1000  # the head
    assert mfu.utilization(2500, flops, peaks) == pytest.approx(0.062, abs=5e-4)
    assert mfu.utilization(2500, flops, peaks, processes=4) == pytest.approx(0.062 / 4, abs=2e-4)


def test_each_part_counts_by_its_own_peak():
    """1 TFLOP of convolutions and 2 of products a sample, at 10 and 5 TFLOP/s: 3 x 0.5 s at the peak."""
    assert mfu.utilization(0.2, (1e12, 2e12), (10e12, 5e12)) == pytest.approx(0.2 * 1.5)


@pytest.fixture
def fp32_precisions():
    """What torch may compute float32 in, put back afterwards."""
    kinds = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [kind.fp32_precision for kind in kinds]
    yield kinds
    for kind, value in zip(kinds, before):
        kind.fp32_precision = value


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (("tf32", "ieee"), ("tf32", "fp32")),
        (("ieee", "tf32"), ("fp32", "tf32")),
        (("none", "none"), ("fp32", "fp32")),
    ],
)
def test_float32_is_tf32_where_torch_computes_in_it(fp32_precisions, allowed, expected):
    for kind, value in zip(fp32_precisions, allowed):
        kind.fp32_precision = value
    assert mfu.precisions("no", "float32") == expected
    assert mfu.precisions("bf16", "float32") == ("bf16", "bf16")
    assert mfu.precisions("no", "float64") == ("float64", "float64")


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10G", "bf16", 70),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "tf32", 8.1),  # it has none
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6),
        ("NVIDIA GeForce RTX 5090", "bf16", 209.5),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "float64", None),
        ("NVIDIA T400", "fp16", None),
        ("cpu", "bf16", None),
    ],
)
def test_a_peak_is_that_of_the_very_device(name, precision, tflops):
    assert mfu.peaks(name, (precision, precision)) == (tflops and (tflops * 1e12, tflops * 1e12))


def test_the_log_counts_the_flops_that_the_summary_tells(tmp_path, monkeypatch, capsys):
    """A CPU of 1 TFLOP/s."""
    monkeypatch.setattr(mfu, "PEAKS", [("cpu", {"fp32": 1.0})])

    run = {"output_dir": str(tmp_path), "experiment_name": "x", "max_steps": 3, "cpu_threads": 1}
    assert session.run(make_config(**run)) == 0
    (told,) = re.findall(r"([\d.,]+) MFLOPs an image", capsys.readouterr().out)
    (line,) = lines_of(tmp_path / "x", "speed")
    by_hand = 3 * float(told.replace(",", "")) * 1e6 * line["samples_per_second"] / 1e12
    assert line["mfu"] == pytest.approx(by_hand, rel=0.01)


def test_without_a_known_peak_the_log_has_no_mfu(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_batches([8] * 2), batch_size=8, experiment_name="x")
    trainer.forward_flops = 1e6, 1e6
    trainer.train()
    (line,) = lines_of(tmp_path / "x", "speed")
    assert "mfu" not in line and line["samples_per_second"] > 0


def test_while_the_body_rests_the_log_has_no_mfu(tmp_path, monkeypatch):
    """Its backward pass is left out, so that three times the forward pass would be too much."""
    monkeypatch.setattr(mfu, "PEAKS", [("cpu", {"fp32": 1.0})])
    run = {"output_dir": str(tmp_path), "experiment_name": "x", "epochs": 2, "freeze_epochs": 1, "cpu_threads": 1}
    assert session.run(make_config(**run, split=(0.05, 0.05, 0.9))) == 0
    assert ["mfu" in line for line in lines_of(tmp_path / "x", "speed")] == [False, True]


class SlowEvaluation(MainTrainer):
    def validate_epoch(self, val_loader):
        time.sleep(1.0)
        return super().validate_epoch(val_loader)


def test_speed_is_that_of_training_alone(tmp_path):
    batches = tiny_batches([8] * 4)
    trainer = tiny_trainer(tmp_path, batches, batches, trainer=SlowEvaluation, batch_size=8, experiment_name="x")
    trainer.train()
    (line,) = lines_of(tmp_path / "x", "speed")
    assert line["samples_per_second"] > 2 * 32  # 32 samples in far less than the second of the evaluation
