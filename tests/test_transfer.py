"""Pretrained weights for other classes, a body that rests at first, and rates that fall from block to block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.arguments import make_config
from configs.errors import ConfigError
from data.embedded import load_digits
from models import BaseModel, ModelError, build
from models.pretrained import begin_from, fit_positions
from tests.conftest import ROOT, lines_of
from tests.test_models import described
from tests.test_scale import train
from tests.tiny import TinyNet, tiny_batches, tiny_trainer
from trainer import checkpoint
from trainer.freezing import freeze, thaw_when_due
from trainer.optim import build_optimizers


class NormedNet(TinyNet):
    """Two blocks with BatchNorm and dropout under the head."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for width in (1, 8)]
        self.body = nn.Sequential(*(nn.Sequential(layer, nn.Dropout(dropout)) for layer in layers))


def state_of(model: BaseModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: BaseModel) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


# ---- pretrained weights ---------------------------------------------------------------------------------------


def test_what_fits_is_taken_and_the_rest_is_listed(tmp_path):
    source = described("simple_cnn", 1, 8)
    source.save_pretrained(tmp_path)
    model = build("simple_cnn", num_classes=5, in_channels=1, image_size=8)
    model.describe(task="classification", classes=list("abcde"), image_size=8, mean=(0.1,), std=(0.9,))
    before = state_of(model)
    begin_from(model, str(tmp_path))
    own, theirs = model.state_dict(), load_file(tmp_path / "model.safetensors")
    for name in own:
        assert torch.equal(own[name], before[name] if name.startswith("head") else theirs[name]), name
    assert model.origin == [
        f"pretrained 18 of 20 tensors, from {tmp_path}",
        "new: head.weight (5, 128), head.bias (5,)",
        "not used: head.bias (3,), head.weight (3, 128)",
        "pixels normalised as those weights expect: mean 0.4, std 0.2",
    ]
    assert model.mean_C11.item() == pytest.approx(0.4)
    assert model.config()["preprocess"]["std"] == pytest.approx([0.2])


@pytest.mark.parametrize(("classes", "taken"), [(["x", "y", "z"], 20), (["x", "z", "y"], 18)])
def test_a_head_of_as_many_other_classes_begins_anew(tmp_path, classes, taken):
    described("simple_cnn", 1, 8).save_pretrained(tmp_path)
    model = build("simple_cnn", num_classes=3, in_channels=1, image_size=8)
    model.describe(task="classification", classes=classes, image_size=8, mean=(0.4,), std=(0.2,))
    begin_from(model, str(tmp_path / "model.safetensors"))
    assert model.origin[0].startswith(f"pretrained {taken} of 20 tensors")


def test_weights_of_another_model_are_refused_with_both_sides(tmp_path):
    described("simple_cnn", 1, 8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"nothing of the body of resnet18.*net\.conv1\.weight.*there is head\.bias"):
        begin_from(described("resnet18", 3, 32), str(tmp_path))
    (tmp_path / "half.pth").write_bytes(b"PK half a file")
    with pytest.raises(ModelError, match="half.pth holds no weights"):
        begin_from(described("simple_cnn", 1, 8), str(tmp_path / "half.pth"))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_picture_in_a_colour_model_looks_as_in_a_grey_one(tmp_path, channels):
    """Its first convolution is summed over the colours, or shared out over them."""
    source = described("simple_cnn", 4 - channels, 8).eval()
    source.save_pretrained(tmp_path)
    model = described("simple_cnn", channels, 8).eval()
    begin_from(model, str(tmp_path))
    grey = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    same = [each.stages[0](each.normalize(grey.expand(-1, len(each.mean_C11), -1, -1))) for each in (model, source)]
    assert torch.allclose(*same, atol=1e-5)
    assert any("stages.0.weight" in line and "colours" in line for line in model.origin)


def test_torchvisions_own_weights_come_from_its_cache_or_the_fault_names_the_file(tmp_path, monkeypatch):
    from torchvision.models import resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing answers
    model = described("resnet18", 3, 64)
    with pytest.raises(ModelError, match=r"cannot be fetched .*put resnet18-f37072fd\.pth into .*hub/checkpoints"):
        begin_from(model, "torchvision")
    theirs = resnet18().eval()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    begin_from(model, "torchvision")
    assert model.origin[0] == "pretrained 120 of 122 tensors, from torchvision"
    assert "new: net.fc.weight (3, 512), net.fc.bias (3,)" in model.origin
    assert model.mean_C11.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    images = torch.rand(2, 3, 64, 64)
    theirs.fc, ours = nn.Identity(), model.eval().net
    ours.fc = nn.Identity()
    assert torch.equal(ours(images), theirs(images))
    with pytest.raises(ModelError, match="simple_cnn is none"):
        begin_from(described("simple_cnn", 1, 8), "torchvision")


def test_positions_of_a_vision_transformer_are_interpolated():
    """[1, class token and patches, D]: two rows of two patches become four of four."""
    state = {"pos_embedding": torch.tensor([7.0, 1, 1, 2, 2]).view(1, 5, 1)}
    notes = fit_positions({"pos_embedding": torch.zeros(1, 17, 1)}, state)
    token, patches = state["pos_embedding"].flatten().split([1, 16])
    rows = patches.view(4, 4)
    assert token.item() == 7
    assert torch.allclose(rows, rows[:, :1].expand(4, 4))
    assert (rows[1:, 0] > rows[:-1, 0]).all()
    assert notes == ["pos_embedding interpolated from 2x2 to 4x4 patches"]


def test_what_to_begin_with_is_said_once():
    with pytest.raises(ConfigError, match="--weights and --pretrained both"):
        make_config(weights="a", pretrained="b")


# ---- what it is for --------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        first = [nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body = nn.Sequential(*first, nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        return (self.body(features_BCHW) + self.shortcut(features_BCHW)).relu()


class SmallResNet(BaseModel):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        shapes = [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(Residual(*shape) for shape in shapes))
        self.head = nn.Linear(64, num_classes)

    @property
    def dim(self) -> int:
        return self.head.in_features

    def init_weights(self) -> None:
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.blocks(self.normalize(images_BCHW)).mean((2, 3)))


def digits(first: int) -> tuple[Tensor, Tensor]:
    """Images and labels 0..4 of the five digits from `first` on."""
    source = load_digits()
    labels = torch.from_numpy(source.labels) - first
    chosen = (labels >= 0) & (labels < 5)
    return source.images_NCHW[chosen], labels[chosen]


def batches_of(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size)))


def accuracy_of_few(folder: Path, seed: int, pretrained: Path | None, **options: float) -> float:
    """Trained on five images of each digit from 5 to 9, measured on all others of them."""
    images, labels = digits(5)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    few = torch.cat([order[labels[order] == label][:5] for label in range(5)])
    rest = torch.tensor(sorted({*range(len(labels))} - {*few.tolist()}))
    torch.manual_seed(seed)
    model = SmallResNet()
    model.describe(task="classification", classes=list("56789"), image_size=8, mean=(0.305,), std=(0.376,))
    if pretrained:
        begin_from(model, str(pretrained))
    train_loader, val_loader = [(images[few], labels[few])], batches_of(images[rest], labels[rest], 256)
    options = {"batch_size": 25, "scheduler": "cosine", "seed": seed, **options}
    trainer = tiny_trainer(folder, train_loader, val_loader, model=model, **options)
    trainer.train_epoch(train_loader * trainer.total_steps)
    return trainer.validate_epoch(val_loader)["accuracy"]


def test_pretraining_on_half_the_classes_beats_training_from_nothing_on_few_samples_of_the_other_half(tmp_path):
    """By 20 steps at the default rate; and by 5 steps, even where the latter takes the best of three rates.

    Given longer or six times the rate, training from nothing comes as far: these digits are easy.
    """
    images, labels = digits(0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = SmallResNet()
    model.describe(task="classification", classes=list("01234"), image_size=8, mean=(0.305,), std=(0.376,))
    batches = batches_of(images[order], labels[order], 32)
    options = {"batch_size": 32, "epochs": 7, "lr": 3e-3, "scheduler": "cosine", "experiment_name": "base"}
    tiny_trainer(tmp_path, batches[:-2], batches[-2:], model=model, **options).train()
    base, seeds = tmp_path / "base", range(3)
    default = [
        sum(accuracy_of_few(tmp_path, seed, begun, max_steps=20, lr=2e-3) for seed in seeds) / 3
        for begun in (base, None)
    ]
    short = sum(accuracy_of_few(tmp_path, seed, base, max_steps=5, lr=4e-3) for seed in seeds) / 3
    best = max(
        sum(accuracy_of_few(tmp_path, seed, None, max_steps=5, lr=lr) for seed in seeds) / 3
        for lr in (4e-3, 1.2e-2, 4e-2)
    )
    print(f"20 steps: pretrained {default[0]:.3f}, from nothing {default[1]:.3f}; 5 steps: {short:.3f}, {best:.3f}")
    assert default[0] > default[1] + 0.4
    assert short > best + 0.2


# ---- a body that rests ----------------------------------------------------------------------------------------


def test_a_frozen_body_has_no_gradient_and_nothing_moves_it(tmp_path):
    """Neither weight decay nor the norms' running statistics nor its averages; afterwards all of it learns."""
    batches = tiny_batches([8] * 3)
    options = {"batch_size": 8, "weight_decay": 0.1, "ema_decay": 0.9, "freeze_epochs": 2, "epochs": 4}
    trainer = tiny_trainer(tmp_path, batches, batches, model=NormedNet(), experiment_name="x", **options)
    model, before = trainer.plain_model, state_of(trainer.plain_model)
    trainer.train_epoch(batches)
    assert changed(before, model) == {"head.weight", "head.bias"}
    averages = trainer.ema.average
    assert all(torch.equal(averages[name], before[name]) for name in averages if name.startswith("body"))
    assert len(trainer.optimizers[0].state) == 2
    model.train()
    loss = model(batches[0][0]).sum()
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    assert not any("Convolution" in type(node).__name__ for node in seen)
    trainer.state.epoch, trainer.state.step_in_epoch = 2, 0
    thaw_when_due(trainer)
    trainer.train_epoch(batches)
    assert changed(before, model) == before.keys()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_run_stopped_on_either_side_of_the_thaw_goes_on_exactly(tmp_path, optimizer, layer_decay, stop):
    """In a frozen epoch, at the milestone, after it; each stop is a session."""
    batches = tiny_batches([8] * 3)
    options = {
        "batch_size": 8, "epochs": 4, "freeze_epochs": 2, "layer_decay": layer_decay, "optimizer": optimizer,
        "lr": 0.01, "weight_decay": 0.1, "ema_decay": 0.9, "log_every": 1, "scheduler": "cosine",
    }  # fmt: skip
    whole = tiny_trainer(tmp_path, batches, batches, model=NormedNet(), experiment_name="whole", **options)
    whole.train()
    first = tiny_trainer(
        tmp_path, batches, batches, model=NormedNet(), experiment_name="part", stop_after_steps=stop, **options
    )
    first.train()
    torch.manual_seed(99)
    back = tiny_trainer(tmp_path, batches, batches, model=NormedNet(), experiment_name="part", **options)
    back.train()
    assert back.session_steps == 12 - stop
    same_tensors(whole.run.path, back.run.path)


def newest(run: Path) -> Path:
    return checkpoint.all_checkpoints(run / "checkpoints")[-1]


def same_tensors(one: Path, other: Path) -> None:
    """All that two finished runs saved, to the last bit."""
    first, second = newest(one), newest(other)
    for file in ("model.safetensors", "ema.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    both = [torch.load(folder / "optimizer.bin", weights_only=True) for folder in (first, second)]
    assert both[0]["param_groups"] == both[1]["param_groups"]
    assert both[0]["state"].keys() == both[1]["state"].keys()
    for place, values in both[0]["state"].items():
        assert all(torch.equal(value, both[1]["state"][place][name]) for name, value in values.items())
    assert lines_of(one) == lines_of(other)


FROZEN = (
    "--model bn_net --dropout 0.2 --micro_batch_size 8 --weight_decay 0.1 --split 0.2 0.05 0.75 --epochs 3 "
    "--freeze_epochs 1 --layer_decay 0.5 --warmup_steps 0 --dtype float64"
).split()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), "two", *FROZEN, processes=2)


def test_two_processes_freeze_and_thaw_as_one_does(two_processes):
    """DDP is made again at the milestone."""
    one = train(two_processes.parent, "one", *FROZEN)
    for file in ("model.safetensors", "ema.safetensors"):
        tensors = [load_file(newest(run) / file) for run in (one, two_processes)]
        assert all(torch.allclose(tensor, tensors[1][name], rtol=1e-9) for name, tensor in tensors[0].items())


@pytest.mark.long
def test_two_processes_stopped_on_both_sides_of_the_thaw_go_on_exactly(two_processes):
    for steps in ("6", "9", "99"):
        parts = train(two_processes.parent, "parts", *FROZEN, "--stop_after_steps", steps, processes=2)
    same_tensors(two_processes, parts)


def test_sharded_models_are_not_frozen():
    state, config = SimpleNamespace(epoch=0), make_config(freeze_epochs=1)
    with pytest.raises(ConfigError, match="--freeze_epochs does not go with FSDP"):
        freeze(SimpleNamespace(state=state, config=config, sharded=True))


@pytest.mark.long
def test_a_compiled_model_thaws_too(tmp_path):
    batches, states = tiny_batches([8] * 4), []
    options = {"batch_size": 8, "epochs": 3, "freeze_epochs": 1, "weight_decay": 0.1, "optimizer": "sgd", "lr": 0.05}
    for compiled in (False, True):
        model = NormedNet(dropout=0.0)
        before = state_of(model)
        tiny_trainer(tmp_path / str(compiled), batches, batches, model=model, compile=compiled, **options).train()
        assert changed(before, model) >= {"body.0.0.0.weight", "body.1.0.1.running_mean", "head.weight"}
        states.append(state_of(model))
    assert all(torch.allclose(tensor, states[1][name], atol=1e-5) for name, tensor in states[0].items())


# ---- rates that fall from block to block ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"conv1.weight": 9, "bn1.bias": 9, "layer1.0.conv1.weight": 8, "layer1.1.conv1.weight": 7,
                      "layer4.0.downsample.0.weight": 2, "layer4.1.bn2.weight": 1, "fc.weight": 0, "fc.bias": 0}),
        ("vit_b_16", {"class_token": 13, "conv_proj.weight": 13, "encoder.pos_embedding": 13,
                      "encoder.layers.encoder_layer_0.mlp.0.weight": 12,
                      "encoder.layers.encoder_layer_11.ln_1.weight": 1, "encoder.ln.weight": 1, "heads.head.bias": 0}),
    ],
)  # fmt: skip
def test_each_block_below_the_head_learns_slower_by_one_factor(name, expected):
    with torch.device("meta"):
        model = build(name, num_classes=3, in_channels=3, image_size=64)
    depths = model.depths()
    parameters = dict(model.net.named_parameters())
    for key, power in expected.items():
        assert depths[parameters[key]] == power, key
    (optimizer,) = build_optimizers(model, make_config(model=name, layer_decay=0.5, optimizer="adam"))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(parameters)
    for group in optimizer.param_groups:
        assert all(0.5 ** depths[parameter] == group["lr_factor"] for parameter in group["params"])
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_the_factor_reaches_the_step_of_every_optimizer(tmp_path, optimizer):
    """A step of a hundredth of the rate moves the weights a hundredth as far."""
    moved = []
    for layer_decay in (1.0, 0.01):
        batches = tiny_batches([8])
        options = {"batch_size": 8, "lr": 1e-4, "optimizer": optimizer, "layer_decay": layer_decay, "momentum": 0.0}
        trainer = tiny_trainer(tmp_path / str(layer_decay), batches, model=NormedNet(), dtype="float64", **options)
        model = trainer.plain_model.double()
        before = state_of(model)
        trainer.train()
        names = ("body.0.0.0.weight", "body.1.0.0.weight", "head.weight")
        moved.append([(model.state_dict()[name] - before[name]).norm().item() for name in names])
    ratios = [small / full for full, small in zip(*moved)]
    assert ratios == pytest.approx([1e-4, 1e-2, 1.0], rel=1e-6)


# ---- timm ------------------------------------------------------------------------------------------------------


def test_without_the_package_one_line_names_the_extra():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from scripts.train import main; sys.exit(main(['--model', 'timm/resnet18', '--max_steps', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "pip install -e '.[timm]'" in line


def test_models_of_timm_are_saved_loaded_and_begun_from(tmp_path):
    timm = pytest.importorskip("timm")
    with pytest.raises(ModelError, match="did you mean timm/resnet18"):
        build("timm/resnet19", num_classes=2)
    model = described("timm/resnet18", 1, 8, dropout=0.3).eval()
    assert model.image_size == 32
    assert (model.dim, model.net.drop_rate) == (512, 0.3)
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    model.save_pretrained(tmp_path / "m")
    loaded = BaseModel.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded(images), model(images))
    torch.save(timm.create_model("resnet18", num_classes=7).state_dict(), tmp_path / "theirs.pth")
    begin_from(model, str(tmp_path / "theirs.pth"))
    assert model.origin[0].startswith("pretrained 120 of 122 tensors")
    assert "net.conv1.weight summed over its 3 colours, for grey images" in model.origin
    small = described("timm/vit_tiny_patch16_224", 3, 40)
    assert small.image_size == 48
    assert sorted(set(small.depths().values())) == list(range(14))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vit_tiny_patch16_224", marks=pytest.mark.long),
                                  pytest.param("convnext_atto", marks=pytest.mark.long)])  # fmt: skip
def test_blocks_of_timm_compute_twice_with_the_same_gradients(name):
    pytest.importorskip("timm")
    from models.recompute import recompute_blocks, recomputed

    torch.manual_seed(0)
    once = described(f"timm/{name}", 3, 48).train()
    twice = described(f"timm/{name}", 3, 48).train()
    twice.load_state_dict(once.state_dict())
    recompute_blocks(twice)
    assert len(recomputed(twice)) >= 4
    images = torch.rand(2, 3, 48, 48)
    for model in (once, twice):
        torch.manual_seed(1)
        model(images).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(once.parameters(), twice.parameters()))
