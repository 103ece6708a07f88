"""`--model_args`: a model's own arguments from flags and files, through saving, loading and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from configs.arguments import make_config, parse, to_yaml
from configs.errors import ConfigError
from configs.model_args import read
from data.embedded import SOURCES
from models import MODELS, BaseModel, build
from scripts import summary
from scripts.session import run
from scripts.wiring import build_data, build_model, check_names
from trainer.run_folder import check_same_run


def test_flags_and_a_mapping_in_yaml_are_the_same_options(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model_args: {width: 64, sizes: [8, 16], name: gelu, scale: 1e-3, text: 'true', none: null}\n")
    config = parse(["--config", str(file)])
    words = ["width=64", "sizes=[8,16]", "name=gelu", "scale=0.001", "text='true'", "none=None"]
    assert config == parse(["--model_args", *words])
    assert hash(config) == hash(replace(config))
    expected = {"width": 64, "sizes": [8, 16], "name": "gelu", "scale": 1e-3, "text": "true", "none": None}
    assert read(config.model_args) == expected
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "b.yaml")]) == config
    assert parse(["--config", str(file), "--model_args", "width=8"]).model_args == ("width=8",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-2", -2), ("0.5", 0.5), ("on", True), ("1:30", "1:30"), ("'8'", "8"), (".inf", ".inf"),
        ("[a, [1, 2.0], {b: no}]", ["a", [1, 2.0], {"b": False}]), ('"a # b"', "a # b"), ('"1"', "1"),
        ("9" * 400, 10**400 - 1),
    ],
)  # fmt: skip
def test_a_value_is_what_yaml_makes_of_it_and_stays_so(text, value):
    config = make_config(model_args=(f"x={text}",))
    assert read(config.model_args) == {"x": value} and type(read(config.model_args)["x"]) is type(value)
    assert make_config(model_args=config.model_args) == config


BOMB = "[&a [1, 1, 1, 1, 1, 1, 1, 1]" + "".join(
    f", &{b} [{', '.join(['*' + a] * 8)}]" for a, b in zip("abcdefghij", "bcdefghijk")
)


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("width", "has 'width'"), ("=3", "has '=3'"), ("width=", "has 'width='"), ("a-b=3", "has 'a-b=3'"),
        ("x=[1", "which is no YAML"), (f"x={BOMB}]", "too large a value"), ("x=&a [*a]", "too large a value"),
        ("x=!!python/name:os.system y", "is not obeyed"), ("x=hf_" + "aBcDeFgHiJkLmNoPqR" * 2, "holds a token"),
    ],
)  # fmt: skip
def test_what_is_no_argument_is_refused(word, fault):
    with pytest.raises(ConfigError, match=fault.replace("[", r"\[")):
        make_config(model_args=(word,))
    with pytest.raises(ConfigError, match="x twice"):
        make_config(model_args=("x=1", "x=2"))


KINDS = {
    "simple_cnn": ("digits", "simple_cnn", ["width=16"]),
    "multitask": ("digit_ink", "grid_cnn", ["width=16", "grid=2"]),
    "torchvision": ("digits", "mobilenet_v3_small", ["width_mult=0.5"]),
    "clip": ("digit_captions", "clip/grid_cnn", ["embedding=24", "width=32", "layers=1", "image_args={width: 8}"]),
    "small_fcos": ("digit_scenes", "small_fcos", ["width=16", "depth=1"]),
    "anchors": ("digit_scenes", "fasterrcnn/resnet18", ["anchor_sizes=[8,16,32,64,128]", "box_score_thresh=0.3"]),
    "timm": ("digits", "timm/vit_tiny_patch16_224", ["depth=2", "drop_path_rate=0.1"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_built_with_them_saved_with_them_and_loaded_with_them(kind, tmp_path):
    if kind == "timm":
        pytest.importorskip("timm")
    dataset, name, words = KINDS[kind]
    config = make_config(dataset=dataset, model=name, model_args=tuple(words))
    plain, data, _ = build_data(replace(config, model_args=()))
    model = build_model(replace(plain, model_args=config.model_args), data)
    assert sum(p.numel() for p in model.parameters()) <= sum(p.numel() for p in build_model(plain, data).parameters())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert read(config.model_args).items() <= saved.items()
    loaded = models.load(str(tmp_path))
    assert loaded.model_args == model.model_args
    assert str(loaded) == str(model.eval())
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "words", "fault"),
    [
        ("small_fcos", ["widht=32"], r"takes no argument 'widht' \(did you mean width\?\); it takes width=64, depth=2"),
        ("small_fcos", ["num_classes=3"], "num_classes of small_fcos is not for --model_args: it comes from the data"),
        ("resnet18", ["image_size=3"], "it comes from --image_size"),
        ("resnet18", ["dropout=0.3"], "it comes from --dropout"),
        ("small_fcos", ["width=wide"], "width of small_fcos is 'wide', it must be int; it takes width=64"),
        ("small_fcos", ["width=true"], "is True, it must be int"),
        ("mobilenet_v3_small", ["widht_mult=2"], "did you mean width_mult"),  # which torchvision would take
        ("resnet18", ["replace_stride_with_dilation=[1]"], r"must be Optional\[.*bool"),
        ("retinanet/resnet18", ["anchor_sises=[8]"], "did you mean anchor_sizes"),
        ("clip/grid_cnn", ["image_args={widht: 3}"], "grid_cnn takes no argument 'widht'"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_what_the_model_takes_before_data_are_opened(model, words, fault):
    with pytest.raises(ConfigError, match=fault):
        check_names(make_config(model=model, model_args=tuple(words)))


def test_sizes_that_cannot_be_built_are_one_line(capsys):
    assert summary.main(["--model_args", "width=30"]) == 2
    said = capsys.readouterr().err
    assert "simple_cnn cannot be built with --model_args width=30: num_channels (30) must be divisible" in said
    assert "Traceback" not in said
    assert (
        summary.main(["--dataset", "digit_scenes", "--model", "fcos/resnet18", "--model_args", "anchor_sizes=[8]"]) == 2
    )
    assert "fcos needs one side for each of its 5 levels" in capsys.readouterr().err
    assert summary.main(["--model_args", "width=16"]) == 0
    assert "simple_cnn width=16: 72,666 parameters" in capsys.readouterr().out


def test_a_run_keeps_them_and_a_resume_with_others_is_refused(tmp_path, capsys):
    options = {"epochs": 1, "output_dir": str(tmp_path), "experiment_name": "a", "cpu_threads": 1}
    config = make_config(model_args=("width=16",), stop_after_steps=2, **options)
    assert run(config) == 75
    assert "model     simple_cnn width=16:" in capsys.readouterr().out
    again = parse(["--config", str(tmp_path / "a" / "config.yaml")])
    assert again.model_args == ("width=16",)
    assert run(replace(config, stop_after_steps=None)) == 0
    assert models.load(str(tmp_path / "a")).head.in_features == 64
    for others in (("width=8",), ()):
        with pytest.raises(ConfigError, match=r"--model_args was \['width=16'\], now \["):
            check_same_run(replace(config, model_args=others), tmp_path / "a")


class Own(BaseModel):
    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, *, width: int, gate: float = 1.0):
        super().__init__()
        self.hidden = nn.Linear(in_channels * image_size**2, width)
        self.head = nn.Linear(width, num_classes)

    dim = 1  # type: ignore[assignment]

    def init_weights(self) -> None:
        pass

    def forward(self, images_BCHW):
        return self.head(self.hidden(self.normalize(images_BCHW).flatten(1)))


def test_a_model_of_ones_own_takes_what_its_constructor_names(monkeypatch):
    monkeypatch.setitem(MODELS, "own", Own)
    config = make_config(model="own", model_args=("width=5", "gate=2"))
    check_names(config)
    completed, data, _ = build_data(config)
    assert build_model(completed, data).hidden.out_features == 5
    with pytest.raises(ConfigError, match="it takes width, gate=1.0"):
        check_names(replace(config, model_args=("wide=5",)))


@pytest.mark.parametrize("name", ["retinanet/resnet18", "fasterrcnn/resnet18"])
def test_anchors_fit_the_boxes_of_small_pictures(name):
    """Of the boxes of digit_scenes, the share that an anchor overlaps by half or more; torchvision's own: 0.18."""
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import box_iou

    def share(**options) -> float:
        net = build(name, num_classes=10, image_size=64, **options).net
        images = torch.zeros(1, 3, 64, 64)
        maker = net.rpn.anchor_generator if hasattr(net, "rpn") else net.anchor_generator
        (anchors,) = maker(ImageList(images, [(64, 64)]), list(net.eval().backbone(images).values()))
        return float((box_iou(boxes, anchors).amax(1) >= 0.5).double().mean())

    boxes = torch.cat([torch.from_numpy(label.boxes_xyxy) for label in SOURCES["digit_scenes"]()["val"].labels])
    assert share() > 0.8
    assert share(anchor_sizes=[32, 64, 128, 256, 512]) < 0.2
    assert share(anchor_sizes=[16, 24, 64, 128, 256]) > 0.8


def test_large_pictures_and_enlarged_ones_have_torchvisions_anchors():
    for options in ({"image_size": 256}, {"image_size": 64, "min_size": 256}, {"image_size": 64, "max_size": 256}):
        net = build("retinanet/resnet18", num_classes=2, **options).net
        assert net.anchor_generator.sizes[0] == (32, 40, 50)
        assert (net.transform.min_size, net.transform.max_size) == ((256,), 256)
    small = build("retinanet/resnet18", num_classes=2, image_size=255).net
    assert small.anchor_generator.sizes[0] == (16, 20, 25)


def test_columns_of_embedded_data_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="--label_columns names columns .* digit_ink is embedded"):
        build_data(make_config(dataset="digit_ink", label_columns=("digit", "ink")))
