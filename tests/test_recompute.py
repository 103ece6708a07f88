"""Gradient checkpointing: less is kept, and not one bit is another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from models.base_model import ModelError
from models.model import build
from models.recompute import recompute_blocks, recomputed
from models.summary import cost, summarize
from tests.test_resume import weights
from tests.tiny import TinyNet, tiny_batches, tiny_trainer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.calls = 0

    def forward(self, features_BCHW: Tensor) -> Tensor:
        self.calls += 1
        return features_BCHW + self.layers(features_BCHW)


class BlockNet(TinyNet):
    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 1), Block(), Block())
        if twice:
            recompute_blocks(self)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}])
def test_a_run_that_computes_twice_is_the_same_to_the_last_bit(tmp_path, options):
    """Dropout, BatchNorm's running statistics and their counters included."""
    trainers = []
    for twice in (False, True):
        batches = tiny_batches([options.get("micro_batch_size", 8)] * 8)
        given = {"batch_size": 8, "ema_decay": 0.9, "experiment_name": str(twice), **options}
        trainers.append(tiny_trainer(tmp_path, batches, tiny_batches([8]), model=BlockNet(twice), **given))
        trainers[-1].train()
    one, other = (trainer.plain_model.state_dict() for trainer in trainers)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(weights(trainers[0]), weights(trainers[1]))
    calls = [trainer.plain_model.body[1].calls for trainer in trainers]
    assert calls == [9, 17]  # the evaluation's one batch is computed once


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnet18", {"BasicBlock"}),
        ("mobilenet_v3_small", {"Conv2dNormActivation", "InvertedResidual"}),
        ("densenet121", {"_DenseBlock", "_Transition"}),  # its layers are handed a list that then grows
        pytest.param("vit_b_16", {"EncoderBlock"}, marks=pytest.mark.long),
        pytest.param("swin_t", {"PatchMerging", "Sequential", "SwinTransformerBlock"}, marks=pytest.mark.long),
    ],
)
def test_blocks_of_torchvision_compute_twice_and_keep_less(name, kinds):
    torch.manual_seed(0)
    model = build(name, num_classes=10, in_channels=3, image_size=64, dropout=None).train()
    twice = copy.deepcopy(model)
    recompute_blocks(twice)
    assert {type(block).__name__ for block in recomputed(twice)} == kinds
    images_BCHW = torch.rand(2, 3, 64, 64)
    for each in (model, twice):
        torch.manual_seed(1)
        with torch.autocast("cpu", enabled=name == "resnet18"):
            loss = each(images_BCHW).float().square().mean()
        loss.backward()
    for (key, one), other in zip(model.named_parameters(), twice.parameters()):
        assert torch.equal(one.grad, other.grad), key
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twice.state_dict().values()))
    assert cost(twice, 3, 64, 8)[1] < 0.6 * cost(model, 3, 64, 8)[1]
    assert cost(twice, 3, 64, 8)[0] == cost(model, 3, 64, 8)[0]
    assert f"instead of {cost(model, 3, 64, 8)[1] / 1e6:,.1f} MB" in summarize(twice, 3, 64, 8)


def test_a_copy_computes_with_its_own_weights():
    model = BlockNet(twice=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.body[1].layers[0].weight.zero_()
    images = torch.rand(4, 1, 6, 6)
    assert not torch.equal(model.eval()(images), other.eval()(images))


def test_a_norm_that_came_into_its_block_later_moves_once_too():
    """As where BatchNorm becomes SyncBatchNorm."""
    model = BlockNet(twice=True)
    model.body[1].layers[1] = nn.BatchNorm2d(8)
    model.train()(torch.rand(4, 1, 6, 6)).square().mean().backward()
    assert [block.layers[1].num_batches_tracked.item() for block in model.body[1:]] == [1, 1]


def test_blocks_that_compute_twice_are_compiled():
    """Without dropout, for which compiled code draws other numbers."""
    torch.manual_seed(0)
    plain, images = TinyNet(), torch.rand(4, 1, 6, 6)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(2)]
    plain.body = nn.Sequential(nn.Sequential(nn.Conv2d(1, 8, 1)), *blocks)
    twice = copy.deepcopy(plain)
    recompute_blocks(twice, compiled=True)
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    for model in (plain, compiled):
        model(images).square().mean().backward()
    assert len(recomputed(twice)) == 3
    for one, other in zip(plain.parameters(), twice.parameters()):
        torch.testing.assert_close(one.grad, other.grad)


def test_batch_norm_in_blocks_that_compute_twice_is_not_compiled():
    """Its statistics would move twice."""
    recompute_blocks(build("resnet18", num_classes=3, in_channels=1, image_size=32))
    with pytest.raises(ModelError, match="--compile and --gradient_checkpointing cannot be had together for Torchvis"):
        recompute_blocks(build("resnet18", num_classes=3, in_channels=1, image_size=32), compiled=True)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ModelError, match="SimpleCNN has no blocks"):
        recompute_blocks(build("simple_cnn", num_classes=3, in_channels=1, image_size=8))
