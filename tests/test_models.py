"""Models: built by name, saved, loaded, described."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import models
from models import BaseModel, ModelError, build
from models.grid_cnn import GridPool
from models.model import input_size, model_names
from models.summary import cost
from tests.conftest import ROOT


class Sub(BaseModel):
    def __init__(self, width: int = 3):
        super().__init__()
        self.layer = nn.Linear(width, 2)

    @property
    def dim(self) -> int:
        return self.layer.in_features

    def init_weights(self) -> None:
        nn.init.constant_(self.layer.weight, 7.0)

    def forward(self, images_BCHW):
        return self.layer(self.normalize(images_BCHW).mean((2, 3)))


class SubSub(Sub):
    def __init__(self, width: int = 3, *, extra: int = 1):
        super().__init__(width)
        self.more = nn.Linear(extra, 1)
        self.layer.weight.data.zero_()

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.constant_(self.more.weight, 5.0)


def test_init_weights_runs_once_after_the_outermost_constructor():
    model = SubSub(extra=4)
    assert (model.layer.weight == 7).all()
    assert (model.more.weight == 5).all()
    assert model.model_args == {"width": 3, "extra": 4}


def test_an_abstract_model_names_what_it_lacks():
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (BaseModel,), {"forward": lambda self, x: x})()


def test_normalising_takes_bytes_and_floats_alike():
    model = Sub()
    model.describe(task="classification", classes=["a", "b"], image_size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (images / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[
        :, None, None
    ]
    assert torch.allclose(model.normalize(images), expected, atol=1e-6)
    assert torch.allclose(model.normalize(images / 255), expected, atol=1e-6)


def described(name: str, channels: int, size: int, **options) -> BaseModel:
    size = input_size(name, size)
    model = build(name, num_classes=3, in_channels=channels, image_size=size, **options)
    model.describe(
        task="classification", classes=["x", "y", "z"], image_size=size, mean=(0.4,) * channels, std=(0.2,) * channels
    )
    return model


@pytest.mark.parametrize(
    ("name", "channels"), [("simple_cnn", 1), ("resnet18", 3), ("efficientnet_b0", 1), ("vit_b_16", 3)]
)
def test_a_saved_model_loads_by_itself_with_equal_outputs_in_a_fresh_process(tmp_path, name, channels):
    model = described(name, channels, 8).eval()
    images = torch.randint(0, 256, (2, channels, model.image_size, model.image_size), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images)
    model.save_pretrained(tmp_path / "m")
    torch.save((images, expected), tmp_path / "io.pt")
    code = (
        "import torch, models; torch.set_num_threads(1); images, expected = torch.load('io.pt');"
        "a, b = models.load('m'), models.BaseModel.from_pretrained('m');"
        "assert torch.equal(a(images), expected) and torch.equal(b(images), expected) and not a.training;"
        "assert a.classes == ['x', 'y', 'z'] and a.image_size == images.shape[-1]"
    )
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_class_of_ones_own_loads_by_its_class(tmp_path):
    model = SubSub(extra=2)
    model.describe(task="classification", classes=["a"], image_size=4, mean=(0.0,), std=(1.0,))
    model.save_pretrained(tmp_path)
    loaded = SubSub.from_pretrained(tmp_path)
    assert loaded.more.in_features == 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_loading_is_strict(tmp_path):
    described("simple_cnn", 1, 8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["num_classes"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit simple_cnn"):
        models.load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345678 no tensors")
    with pytest.raises(ModelError, match="does not fit"):
        models.load(str(tmp_path))


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path):
    from models.load import load_weights_into

    described("simple_cnn", 1, 8).save_pretrained(tmp_path)
    other = build("simple_cnn", num_classes=5, in_channels=1, image_size=8)
    with pytest.raises(ModelError, match=r"head.weight: \(3, 128\) instead of \(5, 128\)"):
        load_weights_into(other, str(tmp_path))
    same = build("simple_cnn", num_classes=3, in_channels=1, image_size=8)
    load_weights_into(same, str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in same.state_dict().items())


def test_torchvisions_own_files_fit(tmp_path):
    from torchvision.models import resnet18

    from models.load import load_weights_into

    theirs = resnet18(num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    ours = build("resnet18", num_classes=3, image_size=64).eval()
    load_weights_into(ours, str(tmp_path / "resnet18.pth"))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_unknown_names_get_the_nearest_and_odd_arguments_a_reason():
    with pytest.raises(ModelError, match="resnet18"):
        build("resnet19", num_classes=2)
    with pytest.raises(ModelError, match="resnet18 has no dropout"):
        build("resnet18", num_classes=2, dropout=0.5)
    assert build("efficientnet_b0", num_classes=2, dropout=0.7).net.classifier[0].p == 0.7


def test_small_images_get_a_small_stem_or_are_resized():
    small, large = (build("resnet18", num_classes=2, image_size=size).net.conv1.stride for size in (32, 64))
    assert (small, large) == ((1, 1), (2, 2))
    assert input_size("alexnet", 8) == 63
    assert input_size("vit_b_16", 40) == 48
    assert input_size("simple_cnn", 8) == 8


def test_simple_cnn_computes_each_sample_alone():
    model = described("simple_cnn", 1, 8).train()
    model.dropout.p = 0.0
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    assert torch.allclose(model(images)[:2], model(images[:2]), atol=1e-5)


def test_cost_equals_a_count_by_hand():
    class TwoLayers(nn.Sequential):
        example_inputs = BaseModel.example_inputs

    model = TwoLayers(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 5))
    found = cost(model, 3, 4, 10)
    assert found.convolution_flops == 2 * 8 * 3 * 9 * 16
    assert found.flops == found.convolution_flops + 2 * 8 * 16 * 5
    assert found.activation_bytes == 4 * 10 * (3 * 16 + 8 * 16)  # the inputs of both layers


@pytest.mark.long
@pytest.mark.parametrize("name", model_names("classification"))
def test_every_model_takes_one_and_three_channels_of_small_images(name):
    for channels in (1, 3):
        if name.startswith("regnet"):  # its constructor computes with numbers that the meta device has not
            if name.endswith(("16gf", "32gf", "128gf")):
                pytest.skip("gigabytes of weights")
            model = described(name, channels, 8)
            assert model.train()(torch.zeros(2, channels, model.image_size, model.image_size)).shape == (2, 3)
            continue
        with torch.device("meta"):
            model = build(name, num_classes=3, in_channels=channels, image_size=input_size(name, 8))
            size = input_size(name, 8)
            assert model.train()(torch.zeros(2, channels, size, size)).shape == (2, 3)
            assert model.dim > 0


@pytest.mark.parametrize(("size", "side"), [(6, 3), (12, 3), (7, 3), (4, 3)])
def test_cells_of_a_grid_are_pooled_as_torch_does(size, side):
    """By an operation whose gradient is deterministic on a GPU, where the cells are equal."""
    grids = []
    for pool in (GridPool(side), nn.AdaptiveMaxPool2d(side)):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        cells = pool(images)
        (cells * torch.arange(cells.numel()).view_as(cells)).sum().backward()
        grids.append((cells, images.grad))
    assert all(torch.equal(*pair) for pair in zip(*grids))
    assert ("AdaptiveMaxPool" in type(GridPool(side)(images).grad_fn).__name__) == bool(size % side)
