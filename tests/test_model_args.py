"""--model_args: what a model is told beyond data and flags."""

from __future__ import annotations

import pytest
import torch
import yaml

import models
from configs import model_args
from configs.arguments import make_config, parse
from configs.errors import ConfigError
from models import ModelError, build
from models.model import check_model_args
from models.torchvision_detectors import TorchvisionDetector
from scripts.wiring import build_data, build_model
from tests.conftest import run_script


def model_of(*flags: str) -> models.BaseModel:
    config, data, _ = build_data(parse([*flags, "--cpu_threads", "1"]), shown=False)
    return build_model(config, data)


def test_flags_and_yaml_say_the_same(tmp_path):
    file = tmp_path / "wide.yaml"
    file.write_text("model: grid_cnn\nmodel_args: {width: 16, grid: 2}\n")
    config = parse(["--config", str(file)])
    assert config == parse("--model grid_cnn --model_args width=16 grid=2".split())
    assert config.model_args == ("width=16", "grid=2")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({"model_args": list(config.model_args)}))
    assert parse(["--config", str(tmp_path / "again.yaml")]).model_args == config.model_args


@pytest.mark.parametrize(
    ("text", "value"),
    [("32", 32), ("1e-3", 0.001), ("0.5", 0.5), ("true", True), ("null", None), ("gelu", "gelu"), ("'7'", "7"),
     ("[8, 16]", [8, 16]), ("[[4, 8], [16]]", [[4, 8], [16]]), ("{width: 8}", {"width": 8}), ("1:30", "1:30")],
)  # fmt: skip
def test_values_are_what_yaml_makes_of_them_and_are_written_to_be_read_again(text, value):
    words = model_args.written((f"name={text}",))
    for given in (f"name={text}", *words):
        found = model_args.read((given,))["name"]
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("wdth=9", "takes no argument 'wdth' .did you mean width.*; it takes width=32, grid=3"),
        ("width=many", "width of grid_cnn is 'many', it must be int"),
        ("width=2.5", "width of grid_cnn is 2.5, it must be int"),
        ("num_classes=3", "num_classes of grid_cnn is not for --model_args: it comes from the data"),
        ("dropout=0.5", "comes from --dropout"),
        ("width=9", "cannot be built with --model_args width=9: num_channels .9. must be divisible"),
        ("width", "--model_args has 'width'"),
        ("width=8 width=16", "--model_args has width twice"),
        ("width=[", "which is no YAML"),
        ("width=!!python/name:os.system", "the tag .* is not obeyed"),
    ],
)
def test_what_the_model_does_not_take_is_one_block(words, said):
    with pytest.raises(ConfigError, match=said):
        config, data, _ = build_data(make_config(model="grid_cnn", model_args=tuple(words.split())), shown=False)
        build_model(config, data)


def test_a_saved_model_is_rebuilt_with_them_and_a_resume_with_others_is_refused(tmp_path):
    flags = ["--output_dir", tmp_path, "--experiment_name", "x", "--cpu_threads", 1, "--model", "grid_cnn"]
    run_script("train.py", *flags, "--model_args", "width=8", "--max_steps", 2)
    assert models.load(tmp_path / "x").model_args["width"] == 8
    done = run_script("train.py", *flags, "--model_args", "width=16", "--max_steps", 4, rc=2)
    assert "model_args" in done.stderr and "width=8" in done.stderr and "width=16" in done.stderr


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("simple_cnn", {"width": 8}), ("resnet18", {"zero_init_residual": True}),
        ("timm/resnet18", {"stem_width": 16}), ("small_fcos", {"width": 16, "depth": 1}),
        ("fcos/resnet18", {"score_thresh": 0.3, "min_size": 80, "max_size": 96}),
    ],
)  # fmt: skip
def test_shipped_models_are_told_what_their_library_takes(name, given):
    check_model_args(name, given)
    shape = {"num_classes": 3, "in_channels": 1, "image_size": 64}
    told, plain = build(name, **shape, **given), build(name, **shape)
    assert given.items() <= told.model_args.items()
    again = build(name, **told.model_args)
    again.load_state_dict(told.state_dict())
    if "width" in given:
        assert sum(p.numel() for p in told.parameters()) < sum(p.numel() for p in plain.parameters())
    with pytest.raises(ModelError, match="takes no argument 'wrong'"):
        check_model_args(name, {"wrong": 1})


def test_a_clip_tells_its_image_encoder():
    model = model_of("--dataset", "digit_captions", "--model_args", "width=32", "image_args={width: 8}")
    assert model.model_args["width"] == 32
    assert model.image_encoder.model_args["width"] == 8
    with pytest.raises(ConfigError, match="grid_cnn takes no argument 'wdth'"):
        model_of("--dataset", "digit_captions", "--model_args", "image_args={wdth: 8}")


def test_anchors_are_told_and_small_pictures_have_smaller_ones():
    def sides(size: int, **given) -> tuple:
        model = build("retinanet/resnet18", num_classes=3, in_channels=1, image_size=size, **given)
        assert isinstance(model, TorchvisionDetector)
        return model.net.anchor_generator.sizes

    large, small = sides(256), sides(64)
    assert torch.tensor(large).equal(2 * torch.tensor(small)) and large[0][0] == 32
    assert sides(64, anchor_sizes=[4, 8, 16, 32, 64]) == ((4,), (8,), (16,), (32,), (64,))
    with pytest.raises(ModelError, match=r"anchor_sizes is \[4, 8\]: retinanet needs .* its 5 levels"):
        sides(64, anchor_sizes=[4, 8])
