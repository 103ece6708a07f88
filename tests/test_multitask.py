"""Several tasks on one backbone: labels that are missing, weights of losses, and the loop's guarantees."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import models
from configs.arguments import make_config
from configs.errors import ConfigError, DataError
from data.dataset import load_data
from data.described import described
from data.embedded import load_digits
from data.loader import eval_loader, train_loader
from models import build
from models.base_model import ModelError
from scripts.prediction import predict_files
from scripts.wiring import completed
from tests.conftest import FSDP, ROOT, lines_of
from tests.tiny import distance, tiny_trainer, weights
from trainer import checkpoint
from trainer.multitask_trainer import MultiTaskTrainer

nan = float("nan")
OF = {
    "digit": {"kind": "classes", "classes": ["0", "1", "2"], "share": 1.0},
    "ink": {"kind": "numbers", "classes": ["ink"], "mean": 2.0, "std": 0.5, "share": 1.0},
    "tags": {"kind": "multi_label", "classes": ["a", "b"], "share": 1.0},
}


def small_model(**options) -> models.BaseModel:
    torch.manual_seed(0)
    heads = {name: len(facts["classes"]) for name, facts in OF.items()}
    model = build("simple_cnn", heads=heads, in_channels=1, image_size=4, dropout=0.0, **options)
    described = {"kind": "several", "of": json.loads(json.dumps(OF))}
    model.describe(task="multitask", classes=[], image_size=4, mean=(0.0,), std=(1.0,), labels=described)
    return model


def batch_of(size: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Mixtures of two patterns: the share of one tells all labels; some are missing."""
    torch.manual_seed(seed)
    bright, patterns = torch.rand(size), torch.randn(2, 1, 4, 4)
    share_B111 = bright[:, None, None, None]
    images = share_B111 * patterns[0] + (1 - share_B111) * patterns[1] + 0.05 * torch.randn(size, 1, 4, 4)
    digit, ink = (bright * 3).long(), 2 + bright
    tags = torch.stack([bright > 0.5, bright < 0.3], 1).to(torch.int8)
    digit[::3], ink[1::4], tags[2::5] = -1, nan, -1
    return {"images_BCHW": images, "labels/digit": digit, "labels/ink": ink, "labels/tags": tags}


def cut(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    parts = {name: values.split(size) for name, values in batch.items()}
    return [dict(zip(parts, one)) for one in zip(*parts.values())]


def trainer_of(folder: Path, batches, model=None, **options) -> MultiTaskTrainer:
    found = tiny_trainer(folder, batches, batches, trainer=MultiTaskTrainer, model=model or small_model(), **options)
    assert isinstance(found, MultiTaskTrainer)
    return found


def losses_of(trainer: MultiTaskTrainer, batch) -> dict[str, torch.Tensor]:
    losses, _ = trainer.forward_pass(dict(batch))
    assert isinstance(losses, dict)
    return losses


def test_a_part_is_the_mean_over_the_samples_that_have_its_label(tmp_path):
    batch = batch_of(30)
    model = small_model()
    known = {"digit": batch["labels/digit"] >= 0, "ink": ~batch["labels/ink"].isnan(),
             "tags": batch["labels/tags"][:, 0] >= 0}  # fmt: skip
    for name, mask in known.items():
        model.labels["of"][name]["share"] = float(mask.float().mean())
    found = losses_of(trainer_of(tmp_path, [batch], model), batch)
    out = model(batch["images_BCHW"])
    labels = {name: batch[f"labels/{name}"][mask] for name, mask in known.items()}
    expected = {
        "loss/digit": nn.CrossEntropyLoss()(out["digit"][known["digit"]], labels["digit"]),
        "loss/ink": nn.MSELoss()(out["ink"][known["ink"], 0], (labels["ink"] - 2) / 0.5),
        "loss/tags": nn.BCEWithLogitsLoss()(out["tags"][known["tags"]], labels["tags"].float()),
    }
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert found["loss"].item() == pytest.approx(sum(v.item() for v in expected.values()), rel=1e-5)


def test_a_sample_without_a_label_moves_nothing_of_that_head(tmp_path):
    batch = batch_of(12)
    batch["labels/digit"][:], batch["labels/ink"][:], batch["labels/tags"][:] = -1, nan, -1
    batch["labels/ink"][3] = 2.5
    trainer = trainer_of(tmp_path, [batch])
    losses = losses_of(trainer, batch)
    losses["loss"].backward()
    digit, ink, tags = trainer.plain_model.heads
    assert not digit.weight.grad.any() and not tags.weight.grad.any() and ink.weight.grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in trainer.plain_model.parameters())
    assert (losses["loss/digit"], losses["loss/tags"]) == (0, 0)
    images = batch["images_BCHW"].clone()
    images[:3] += 9  # of samples without any label
    again = losses_of(trainer, batch | {"images_BCHW": images})
    assert again["loss"] == losses["loss"]


@pytest.mark.parametrize("loss_weights", [("ink=0.5",), ("learnt",)])
def test_micro_batches_change_nothing_though_some_have_no_label(tmp_path, loss_weights):
    batch = {name: values.double() if values.is_floating_point() else values for name, values in batch_of(32).items()}
    batch["labels/ink"][:8], batch["labels/tags"][8:] = nan, -1
    ends = []
    for size in (32, 8, 3):
        model = small_model(learnt_weights=loss_weights == ("learnt",)).double()
        options = {"epochs": 3, "batch_size": 32, "lr": 0.1, "optimizer": "sgd", "loss_weights": loss_weights}
        trainer = trainer_of(tmp_path / str(size), cut(batch, size), model, **options)
        trainer.train()
        ends.append(weights(trainer))
    assert all(distance(end, ends[0]) < 1e-12 for end in ends[1:])


def test_learnt_weights_are_those_of_uncertainty(tmp_path):
    batch = batch_of(20)
    model = small_model(learnt_weights=True)
    model.log_variances.data = torch.tensor([0.3, -0.7, 0.1])
    trainer = trainer_of(tmp_path, [batch], model, loss_weights=("learnt",))
    found = losses_of(trainer, batch)
    digit, ink, tags = (found[f"loss/{name}"].item() for name in OF)
    expected = math.exp(-0.3) * digit + math.exp(0.7) / 2 * ink + math.exp(-0.1) * tags + (0.3 - 0.7 + 0.1) / 2
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)
    found["loss"].backward()
    assert model.log_variances.grad[0].item() == pytest.approx(0.5 - math.exp(-0.3) * digit, rel=1e-4)


def test_fixed_weights_weigh_and_unknown_tasks_are_named(tmp_path):
    batch = batch_of(20)
    found = losses_of(trainer_of(tmp_path, [batch], loss_weights=("digit=2", "ink=0.5")), batch)
    digit, ink, tags = (found[f"loss/{name}"].item() for name in OF)
    assert found["loss"].item() == pytest.approx(2 * digit + 0.5 * ink + tags, rel=1e-5)
    with pytest.raises(ConfigError, match="names digits, which is no task"):
        trainer_of(tmp_path, [batch], loss_weights=("digits=2",))


def test_one_batch_is_learnt_by_heart_and_measured_where_labels_are_known(tmp_path):
    batch = batch_of(24)
    options = {"epochs": 80, "batch_size": 24, "lr": 0.01, "experiment_name": "x"}
    trainer = trainer_of(tmp_path, [batch], small_model(), **options)
    result = trainer.train()
    assert result["best"]["metric"] == "digit/accuracy"
    line = lines_of(tmp_path / "x", "val")[-1]
    assert line["digit/accuracy"] == line["tags/map"] == line["tags/accuracy"] == 1
    assert line["ink/mae"] < 0.1 and line["ink/r2"] > 0.8
    assert set(line) - {"kind", "step", "epoch"} == {
        *trainer.val_metric_names(), "loss/digit", "loss/ink", "loss/tags"
    }  # fmt: skip
    row = trainer.as_rows(trainer.inference(batch["images_BCHW"]))[1]
    assert row["digit"] == str(batch["labels/digit"][1].item())
    assert list(row) == ["digit", "digit_probability", "ink", "tags", "tags_probabilities"]


def test_a_stopped_run_goes_on_to_the_last_bit(tmp_path):
    batches = cut(batch_of(40), 4)
    options = {"batch_size": 8, "epochs": 3, "lr": 0.01, "loss_weights": ("learnt",), "ema_decay": 0.9, "log_every": 2}

    def run(name: str, **more) -> MultiTaskTrainer:
        trainer = trainer_of(
            tmp_path, batches, small_model(learnt_weights=True), experiment_name=name, **options, **more
        )
        trainer.train()
        return trainer

    whole = run("whole")
    run("part", stop_after_steps=4)
    part = run("part")
    assert torch.equal(weights(whole), weights(part))
    assert whole.plain_model.log_variances.abs().min() > 0
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "part")
    for file in ("model.safetensors", "ema.safetensors", "optimizer.bin"):
        one, other = (checkpoint.all_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "part"))
        assert (one / file).read_bytes() == (other / file).read_bytes()
    loaded = models.load(str(tmp_path / "part"))
    assert loaded.labels == whole.plain_model.labels and loaded.config() == whole.plain_model.config()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "vit_b_32"])
def test_any_classifier_gives_features_without_its_head(name):
    with torch.device("meta"):
        model = build(name, heads={"a": 3, "b": 1}, image_size=64)
        whole = build(name, num_classes=1, image_size=64)
        out = model.eval()(torch.zeros(2, 3, 64, 64))
    assert {key: tuple(value.shape) for key, value in out.items()} == {"a": (2, 3), "b": (2, 1)}
    assert model.dim == whole.dim
    heads = sum(p.numel() for p in model.heads.parameters())
    assert sum(p.numel() for p in model.parameters()) - heads == sum(p.numel() for p in whole.parameters()) - (
        whole.dim + 1
    )


def test_no_task_has_the_name_of_the_weights():
    with pytest.raises(ModelError, match="log_variances"):
        build("simple_cnn", heads={"log_variances": 1})


# ---- data ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """160 digits: class, ink and a list of classes, each missing in some rows; rows 5, 65, 125 lack all."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    digits = load_digits()
    rows = []
    for row in range(160):
        file, pixels = io.BytesIO(), digits.images_NCHW[row, 0].numpy()
        Image.fromarray(pixels).save(file, "PNG")
        label, ink = int(digits.labels[row]), float(pixels.mean() / 255)
        rows.append({
            "image": {"bytes": file.getvalue(), "path": None},
            "digit": None if row % 3 == 2 else label,
            "ink": None if row % 4 == 1 else ink,
            "tags": None if row % 5 == 0 else [n for n, yes in enumerate((label % 2 == 0, label > 4)) if yes],
        })  # fmt: skip
    features = Features({
        "image": ImageFeature(), "digit": ClassLabel(names=[str(n) for n in range(10)]), "ink": Value("float32"),
        "tags": List(ClassLabel(names=["even", "high"])),
    })  # fmt: skip
    file = tmp_path_factory.mktemp("several") / "all.parquet"
    table = Dataset.from_list(rows, features=features)
    table.select([row for row in range(160) if row % 60 != 5]).to_parquet(file, batch_size=40)
    table.select([*range(40)]).to_parquet(file.with_name("bad.parquet"))
    return file


FLAGS = ("--label_columns", "digit", "ink", "tags")


def config_of(file: Path, **options):
    plain = {"data_files": (str(file),), "label_columns": FLAGS[1:], "batch_size": 16, "num_workers": 0}
    return make_config(**(plain | options))


def test_each_column_is_read_by_its_type_and_may_miss_labels(parquet):
    data = load_data(config_of(parquet))
    assert str(data.kind) == "digit: 10 classes; ink: a number, ink; tags: any of 2 classes"
    assert data.kind.model_args == {"heads": {"digit": 10, "ink": 1, "tags": 2}}
    config = completed(config_of(parquet), data.kind)
    assert (config.task, config.labels, config.model) == ("multitask", "several", "simple_cnn")
    facts = described(data.kind, data.train.labels, "balanced")["of"]
    missing = {name: 1 - facts[name]["share"] for name in facts}
    assert missing == pytest.approx({"digit": 1 / 3, "ink": 1 / 4, "tags": 1 / 5}, abs=0.06)
    assert len(facts["digit"]["weights"]) == 10 and len(facts["tags"]["weights"]) == 2
    counts = data.kind.counts(data.train.labels)
    assert len(counts) == len(data.classes) == 13
    batch = next(iter(eval_loader(config, data.val, 8)))
    assert {name: (values.dtype, values.shape[1:]) for name, values in batch.items() if "labels" in name} == {
        "labels/digit": (torch.int64, ()), "labels/ink": (torch.float32, ()), "labels/tags": (torch.int8, (2,))
    }  # fmt: skip


def test_a_sample_without_any_label_is_a_fault(parquet):
    bad = parquet.with_name("bad.parquet")
    with pytest.raises(DataError, match="all of its labels are missing"):
        load_data(config_of(bad))
    streamed = config_of(bad, streaming=True, max_bad_fraction=0.5, batch_size=8, split=(1.0, 0.0, 0.0))
    loader = train_loader(streamed, load_data(streamed))
    for batch, _ in zip(loader, range(5)):
        nothing = (batch["labels/digit"] < 0) & batch["labels/ink"].isnan() & (batch["labels/tags"][:, 0] < 0)
        assert not nothing.any()
    assert "all of its labels are missing" in {bad.reason for bad in loader.bad}


@pytest.mark.parametrize(
    ("columns", "words"),
    [(("digit",), "two columns or more"), (("digit", "digit"), "two columns or more"), (("digit", "inks"), "inks")],
)
def test_columns_that_do_not_fit_are_named(parquet, columns, words):
    with pytest.raises(DataError, match=words):
        load_data(config_of(parquet, label_columns=columns))


@pytest.mark.parametrize(
    ("options", "words"), [({"mixup": 0.2}, "one class a sample"), ({"task": "classification"}, "learns classes or")]
)
def test_options_that_do_not_fit_are_refused(parquet, options, words):
    config = config_of(parquet, **options)
    with pytest.raises(ConfigError, match=words):
        completed(config, load_data(config).kind)


def train(
    folder: Path,
    name: str,
    file: Path,
    *flags: str,
    processes: int = 1,
    sharded: bool = False,
    loss_weights: str = "learnt",
) -> Path:
    """A run in float64 whose micro-batches may be cut anyhow."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = (
        f"--data_files {file} --batch_size 32 --max_steps 6 --dtype float64 --optimizer sgd --lr 0.1 --dropout 0 "
        f"--loss_weights {loss_weights} --cpu_threads 1 --num_workers 0 --trace_samples --log_every 1"
    )
    command = [sys.executable, *(launcher if processes > 1 else []), "tests/bn_net.py", *options.split(), *FLAGS]
    done = subprocess.run(
        [*command, *flags, "--output_dir", str(folder), "--experiment_name", name], cwd=ROOT, capture_output=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        | (FSDP if sharded else {}), text=True, timeout=300,
    )  # fmt: skip
    assert json.loads((folder / name / "status.json").read_text())["state"] in ("done", "preempted"), done.stderr
    assert ("sharded by FSDP2" in done.stdout) == sharded
    return folder / name


def weights_of(run: Path) -> torch.Tensor:
    file = checkpoint.all_checkpoints(run / "checkpoints")[-1] / "model.safetensors"
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(load_file(file).items())])


def check_alike(one: Path, two: Path) -> None:
    assert distance(weights_of(two), weights_of(one)) < 1e-9
    assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
    lines = [lines_of(run) for run in (one, two)]
    assert len(lines[0]) == len(lines[1]) > 1
    for line, same in zip(*lines):
        assert line.pop("kind") == same.pop("kind")
        assert line == pytest.approx(same, rel=1e-5, abs=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_with_learnt_weights_goes_on_with_another_number_of_processes(parquet, tmp_path, sharded):
    whole = train(tmp_path, "whole", parquet)
    for processes, stop in ((1, ["--stop_after_steps", "2"]), (2, ["--stop_after_steps", "2"]), (1, [])):
        flags = ["--micro_batch_size", "16", *stop]
        run = train(tmp_path, "parts", parquet, *flags, processes=processes, sharded=sharded and processes > 1)
    check_alike(whole, run)


@pytest.mark.long
@pytest.mark.parametrize("flags", [("--class_weights", "balanced"), ("--streaming",)])
def test_processes_and_micro_batches_change_nothing(parquet, tmp_path, flags):
    one = train(tmp_path, "one", parquet, *flags)
    two = train(tmp_path, "two", parquet, *flags, "--micro_batch_size", "4", processes=2)
    check_alike(one, two)
    if "--streaming" not in flags:
        row = next(predict_files(str(one), [png(tmp_path)], 4))
        assert row["digit"] in "0123456789" and isinstance(row["ink"], float) and isinstance(row["tags"], list)


def png(folder: Path) -> Path:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "black.png")
    return folder / "black.png"
