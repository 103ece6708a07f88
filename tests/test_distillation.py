"""A student and its teacher, against loops and values by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision

import models
from configs.arguments import make_config, parse
from configs.errors import ConfigError
from models import ModelError
from scripts.replaying import replay
from scripts.session import run as session
from tests.conftest import lines_of, same_run
from tests.tiny import TinyNet, distance, tiny_batches, tiny_trainer, weights
from trainer import checkpoint
from trainer.distillation import distillation_loss, distilled, fingerprint, resized
from trainer.main_trainer import MainTrainer

OPTIONS = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.1, "teacher": "given"}


class Teacher(TinyNet):
    """It would compute otherwise in training: BatchNorm and dropout. It keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.shown: list[Tensor] = []

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.shown.append(images_BCHW)
        return super().forward(images_BCHW)


def student(folder: Path, train: Any, val: Any = None, *, teacher: nn.Module | None = None, **options: Any) -> Any:
    task: Any = distilled(MainTrainer, teacher or Teacher())
    return tiny_trainer(folder, train, val, trainer=task, **(OPTIONS | options))


def test_the_loss_and_its_gradient_have_the_values_of_the_paper():
    """T^2 sum p log(p / q), and T (q - p) of one sample's mean (its equation 2)."""
    generator = torch.Generator().manual_seed(0)
    logits, taught = (3 * torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    for temperature in (1.0, 2.0, 4.0):
        p, q = (values.detach().div(temperature).softmax(1) for values in (taught, logits))
        loss = distillation_loss(logits, taught, temperature)
        assert loss.item() == pytest.approx((temperature**2 * (p * (p / q).log()).sum(1).mean()).item())
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.allclose(gradient, temperature * (q - p) / 5)
    assert distillation_loss(taught, taught, 3.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("micro", [8, 2])
def test_the_updates_are_those_of_a_hand_written_loop(tmp_path, micro):
    batches = tiny_batches([8] * 6)
    parts = [part for batch in batches for part in zip(*(tensor.split(micro) for tensor in batch))]
    teacher = Teacher().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    options = {"batch_size": 8, "distill_weight": 0.3, "distill_temperature": 4.0, "label_smoothing": 0.1}
    trainer = student(tmp_path, parts, teacher=teacher, **options)
    means = trainer.train_epoch(parts)
    reference, fixed, losses = TinyNet(), Teacher().eval(), []
    for images, labels in batches:
        logits, taught = reference(images), fixed(images).detach()
        cross_entropy = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        p, log_q = (taught / 4).softmax(1), (logits / 4).log_softmax(1)
        distillation = 16 * (p * (p.log() - log_q)).sum(1).mean()
        (0.7 * cross_entropy + 0.3 * distillation).backward()
        losses.append((cross_entropy.item(), distillation.item()))
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    assert distance(weights(trainer), torch.cat([p.detach().flatten() for p in reference.parameters()])) < 1e-6
    cross_entropy, distillation = torch.tensor(losses).mean(0).tolist()
    assert means["loss/cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert means["loss/distillation"] == pytest.approx(distillation, rel=1e-5)
    assert means["loss"] == pytest.approx(0.7 * cross_entropy + 0.3 * distillation, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


def test_an_evaluation_is_that_of_a_run_without_a_teacher(tmp_path):
    batches, val = tiny_batches([8] * 2), tiny_batches([8] * 3, seed=1)
    teacher = Teacher()
    taught = student(tmp_path, batches, val, teacher=teacher, label_smoothing=0.1)
    plain = tiny_trainer(tmp_path, batches, val, label_smoothing=0.1)
    assert taught.validate_epoch(val) == plain.validate_epoch(val)
    assert teacher.shown == []
    assert taught.val_metric_names() == plain.val_metric_names()


def test_the_teacher_sees_the_mixed_images_at_the_size_that_it_is_used_to(tmp_path):
    batch = tiny_batches([8])
    teacher, model = Teacher(), Teacher()
    student(tmp_path, batch, teacher=teacher, model=model, mixup=0.5, batch_size=8).train_epoch(batch)
    assert torch.equal(teacher.shown[0], model.shown[0])
    assert not torch.equal(teacher.shown[0], batch[0][0])
    small = Teacher()
    small.image_size = 4
    student(tmp_path, batch, teacher=small, model=Teacher(), batch_size=8).train_epoch(batch)
    assert small.shown[0].shape == (8, 1, 4, 4)
    pixels = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resized(pixels, 5), vision.resize(pixels.float() / 255, [5, 5], antialias=True), atol=1e-6)
    assert resized(pixels, 9) is pixels


@pytest.mark.long
def test_a_compiled_student_has_a_compiled_teacher(tmp_path):
    batches, results = tiny_batches([8] * 2), []
    for compiled in (False, True):
        trainer = student(tmp_path, batches, batch_size=8, model=TinyNet(), compile=compiled, teacher=TinyNet())
        trainer.train_epoch(batches)
        results.append(weights(trainer))
    assert distance(*results) < 1e-5


def test_the_fingerprint_is_of_weights_and_of_what_the_pixels_are_measured_by():
    one, same, other, darker = TinyNet(), TinyNet(), TinyNet(), TinyNet()
    other.head.bias.data[0] += 1e-6
    darker.mean_C11 += 0.1
    assert fingerprint(one) == fingerprint(same)
    assert len({fingerprint(model) for model in (one, other, darker)}) == 3


# ---- whole runs ---------------------------------------------------------------------------------------------

RUN = (
    "--epochs 2 --batch_size 96 --micro_batch_size 48 --mixup 0.2 --ema_decay 0.9 --trace_samples --log_every 1 "
    "--save_every_steps 5 --cpu_threads 1"
).split()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    session(parse(["--epochs", "1", "--cpu_threads", "1", "--output_dir", str(folder), "--experiment_name", "teacher"]))
    return folder / "teacher"


def train(teacher: Path, name: str, *flags: str) -> Path:
    folder = teacher.parent
    config = parse(["--output_dir", str(folder), "--experiment_name", name, "--teacher", str(teacher), *RUN, *flags])
    session(config)
    return folder / name


@pytest.fixture(scope="module")
def taught(teacher) -> Path:
    return train(teacher, "taught")


def test_a_run_that_was_stopped_goes_on_with_the_same_teacher(teacher, taught):
    train(teacher, "parts", "--stop_after_steps", "17")
    same_run(taught, train(teacher, "parts"))


def test_the_teacher_is_named_and_not_saved(teacher, taught):
    (newest,) = checkpoint.all_checkpoints(taught / "checkpoints")[-1:]
    assert checkpoint.read_state(newest)["teacher"] == fingerprint(models.load(str(teacher)))
    own = models.load(str(teacher)).state_dict().keys()
    for file in (newest / "model.safetensors", newest / "ema.safetensors", taught / "best" / "model.safetensors"):
        assert load_file(file).keys() == own
    assert {"loss", "loss/cross_entropy", "loss/distillation"} <= lines_of(taught, "train")[0].keys()
    assert not any(name.startswith("loss/") for name in lines_of(taught, "val")[0])


def test_another_teacher_is_refused_at_a_resume(teacher, taught, tmp_path):
    train(teacher, "changed", "--stop_after_steps", "3")
    was = fingerprint(models.load(str(teacher)))
    shutil.copytree(teacher, tmp_path / "kept")
    try:
        shutil.copy(taught / "best" / "model.safetensors", teacher / "best" / "model.safetensors")
        now = fingerprint(models.load(str(teacher)))
        with pytest.raises(ConfigError, match=f"another teacher: the sha256 of its weights was {was}, now it is {now}"):
            train(teacher, "changed")
    finally:
        shutil.copy(tmp_path / "kept" / "best" / "model.safetensors", teacher / "best" / "model.safetensors")
    with pytest.raises(ConfigError, match="--teacher was .*, now .*kept"):
        train(teacher, "changed", "--teacher", str(tmp_path / "kept"))


def test_a_step_is_computed_again_with_the_teacher(taught, capsys):
    assert replay(taught, 13, parse(["--config", str(taught / "config.yaml")])) == 0
    said = capsys.readouterr().out
    assert "metrics.jsonl: equal to the last bit" in said
    assert "loss/distillation" in said


def test_check_tries_the_teacher_out(teacher, tmp_path, capsys):
    flags = ["--teacher", str(teacher), "--output_dir", str(tmp_path), "--batch_size", "8", "--cpu_threads", "1"]
    assert session(parse([*flags, "--check"])) == 0
    assert "loaded again, equal to the bit" in capsys.readouterr().out


def test_a_teacher_of_something_else_is_refused(teacher, tmp_path, image_folder):
    def refused(*flags: str) -> str:
        with pytest.raises((ConfigError, ModelError)) as error:
            train(teacher, "refused", *flags)
        return str(error.value)

    said = refused("--train_data_dir", str(image_folder), "--batch_size", "4")
    assert "has the 10 classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, the data the 2 classes bright, dark" in said
    for key, value, words in (
        ("task", "detection", "was trained for detection, --task is classification"),
        ("preprocess", {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}, "takes images of 3 channel"),
    ):
        folder = tmp_path / key
        shutil.copytree(teacher / "best", folder)
        described = json.loads((folder / "config.json").read_text())
        described[key] = described[key] | value if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(described))
        assert words in refused("--teacher", str(folder))
    assert "does not exist" in refused("--teacher", str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distill_weight": 0.3}, "--distill_weight 0.3 does nothing without --teacher"),
        ({"distill_temperature": 3.0}, "--distill_temperature 3.0 does nothing without --teacher"),
        ({"teacher": "a", "distill_weight": 1.1}, "--distill_weight is 1.1: it must be at most 1"),
        ({"teacher": "a", "distill_temperature": 0.0}, "--distill_temperature is 0.0: it must be above 0"),
        ({"teacher": "a", "task": "detection"}, "--task is detection"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        make_config(**options)
