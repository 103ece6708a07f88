"""The mean over several views of an image, against sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from configs.arguments import parse
from configs.errors import ConfigError
from data.dataset import load_data
from data.loader import eval_loader
from data.transforms import eval_transform
from models.views import MeanOfViews
from scripts import predict, test
from scripts.session import run as session
from scripts.wiring import build_data, look_at_views
from tests.conftest import lines_of
from tests.tiny import TinyNet, tiny_trainer


def views(images_BCHW: torch.Tensor, *, mirror: bool) -> list[torch.Tensor]:
    if mirror:
        return [images_BCHW, images_BCHW[..., list(range(images_BCHW.shape[3]))[::-1]]]
    framed = nn.functional.pad(images_BCHW.float(), (1, 1, 1, 1), mode="replicate").to(images_BCHW.dtype)
    height, width = images_BCHW.shape[2:]
    corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    return [framed[:, :, top : top + height, left : left + width] for top, left in corners]


def mean_by_hand(model: nn.Module, images_BCHW: torch.Tensor, *, mirror: bool) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model(view).softmax(1) for view in views(images_BCHW, mirror=mirror)]).mean(0)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("shape", [(3, 1, 6, 9), (2, 1, 1, 1)])
def test_probabilities_are_the_mean_over_the_views(mirror, shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = TinyNet().eval()
    log_p = MeanOfViews(model, mirror=mirror)(images)
    assert torch.allclose(log_p.exp(), mean_by_hand(model, images, mirror=mirror), atol=1e-6)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(len(images)))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    session(parse(["--epochs", "2", "--output_dir", str(folder), "--experiment_name", "x", "--cpu_threads", "1"]))
    return folder / "x"


def test_test_measures_the_mean_and_says_so(run):
    assert test.main(["--weights", str(run), "--tta"]) == 0
    assert test.main(["--weights", str(run)]) == 0
    with_views, without = lines_of(run, "test")
    assert with_views["tta"] is True
    assert "tta" not in without
    config = parse(["--config", str(run / "config.yaml")])
    config, data, _ = build_data(config, shown=False)
    split = load_data(config, test=True).test
    assert split is not None
    model, p, labels = models.load(str(run)), [], []
    for batch in eval_loader(config, split, data.image_size):
        p.append(mean_by_hand(model, batch["images_BCHW"], mirror=False))
        labels.append(batch["labels"])
    p_NC, labels_N = torch.cat(p), torch.cat(labels)
    assert with_views["accuracy"] == pytest.approx((p_NC.argmax(1) == labels_N).double().mean().item())
    assert with_views["loss"] == pytest.approx(nn.functional.nll_loss(p_NC.log(), labels_N).item(), rel=1e-5)
    assert with_views["loss"] != pytest.approx(without["loss"], rel=1e-3)


def test_predict_writes_the_mean_of_a_model_that_may_see_mirror_images(tmp_path, image_folder):
    flags = ["--train_data_dir", str(image_folder), "--output_dir", str(tmp_path), "--experiment_name", "a"]
    session(parse([*flags, "--epochs", "1", "--batch_size", "4", "--num_workers", "0"]))
    best = tmp_path / "a" / "best"
    assert json.loads((best / "config.json").read_text())["preprocess"]["horizontal_flip"] is True
    file, output = image_folder / "dark" / "3.png", tmp_path / "p.jsonl"
    assert predict.main(["--weights", str(best), str(file), "--tta", "--output", str(output)]) == 0
    model = models.load(str(best))
    image = eval_transform(model.image_size or 0).cut(file.read_bytes(), 0, 1)[None]
    p_C = mean_by_hand(model, image, mirror=True)[0]
    row = json.loads(output.read_text())
    assert row["probability"] == pytest.approx(p_C.max().item(), abs=2e-6)
    assert row["label"] == model.classes[int(p_C.argmax())]


def test_a_model_says_whether_a_mirror_image_shows_the_same(run):
    file = run / "best" / "config.json"
    described = json.loads(file.read_text())
    assert described["preprocess"]["horizontal_flip"] is False  # digits
    model = models.load(str(run))
    assert model.horizontal_flip is False
    described["preprocess"]["horizontal_flip"] = True
    weights = run / "best" / "model.safetensors"
    assert models.BaseModel.from_config(described, weights).horizontal_flip is True
    del described["preprocess"]["horizontal_flip"]  # a model of before
    assert models.BaseModel.from_config(described, weights).horizontal_flip is False


def test_other_tasks_have_no_probabilities_of_classes_to_average(tmp_path):
    trainer = tiny_trainer(tmp_path, None)
    trainer.plain_model.task = "detection"
    with pytest.raises(ConfigError, match="the model's task is detection"):
        look_at_views(trainer)
