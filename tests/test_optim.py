from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.arguments import make_config
from tests.conftest import lines_of
from tests.tiny import tiny_batches, tiny_trainer
from trainer.ema import WeightAverage
from trainer.optim import build_optimizers, clip_gradients, lr_factor


def factors(steps: int, steps_per_epoch: int = 5, **options) -> list[float]:
    config = make_config(**options)
    return [lr_factor(s, config, total_steps=steps, epoch=s / steps_per_epoch) for s in range(steps)]


def torch_factors(make, steps: int, every: int = 1) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for step in range(1, steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step % every == 0:
            scheduler.step()
    return found


def test_schedules_equal_those_of_torch():
    from torch.optim import lr_scheduler as reference

    assert factors(40, scheduler="cosine") == pytest.approx(
        torch_factors(lambda o: reference.CosineAnnealingLR(o, 40), 40), abs=1e-9
    )
    assert factors(40, scheduler="one_cycle") == pytest.approx(
        torch_factors(lambda o: reference.OneCycleLR(o, 1.0, 40, cycle_momentum=False), 40), abs=1e-9
    )
    assert factors(40, scheduler="step", decay_epochs=2) == pytest.approx(
        torch_factors(lambda o: reference.StepLR(o, 2, 0.1), 40, every=5)
    )
    assert factors(40, scheduler="exponential", decay_factor=0.5)[::5] == pytest.approx([0.5**n for n in range(8)])
    assert factors(4, scheduler="constant") == [1.0] * 4


def test_warmup_rises_to_the_peak_and_cosine_follows():
    found = factors(20, scheduler="cosine", warmup_steps=5)
    assert found[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert found[5:] == sorted(found[5:], reverse=True)


def test_clipping_equals_torch():
    ours = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for max_norm in (0.5, 100.0):
        for a, b in zip(ours[:2], theirs[:2]):  # the third has no gradient
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        norm = clip_gradients(ours, max_norm)
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs, max_norm).item())
        for a, b in zip(ours[:2], theirs[:2]):
            assert torch.allclose(a.grad, b.grad)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_every_optimizer_learns_and_leaves_biases_and_norms_undecayed(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
    inputs, labels = torch.randn(64, 8), torch.arange(64) % 2
    inputs[:, 0] += 4 * labels
    optimizers = build_optimizers(model, make_config(optimizer=name, lr=0.05, weight_decay=0.01))
    owned = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in owned} == {id(p) for p in model.parameters()}
    assert len(owned) == 6
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    before = nn.functional.cross_entropy(model(inputs), labels).item()
    for _ in range(60):
        nn.functional.cross_entropy(model(inputs), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert nn.functional.cross_entropy(model(inputs), labels).item() < before / 2


def test_the_weight_average_follows_its_formula_and_gives_the_weights_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = WeightAverage(model, decay=0.9)
    expected = model[0].weight.detach().clone()
    for step in (1, 2, 3, 200):
        with torch.no_grad():
            model[0].weight.add_(1.0)
            model[1].running_mean.add_(1.0)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight
        ema.update(step)
    live = model[0].weight.detach().clone()
    with ema.applied():
        assert torch.allclose(model[0].weight, expected)
        assert 0 < model[1].running_mean[0] < 4
    assert torch.equal(model[0].weight, live)
    other = WeightAverage(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), 0.9)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(other.average[name], ema.average[name]) for name in ema.average)


@pytest.mark.parametrize(
    ("rule", "batch_size", "factor"), [("none", 64, 1), ("linear", 64, 0.25), ("sqrt", 64, 0.5), ("linear", 256, 1)]
)
def test_the_learning_rate_grows_with_the_batch_by_its_rule(tmp_path, rule, batch_size, factor):
    """--lr is that of a batch of 256."""
    options = {"lr": 0.1, "lr_scale": rule, "batch_size": batch_size, "log_every": 1}
    trainer = tiny_trainer(tmp_path, tiny_batches([batch_size] * 2), **options)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * factor)
    trainer.train()
    assert [line["lr"] for line in lines_of(trainer.run.path, "train")] == pytest.approx([0.1 * factor] * 2)
