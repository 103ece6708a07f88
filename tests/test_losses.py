from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.errors import UserError
from trainer.losses import combine

OUT, TARGET = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
L1, L2 = nn.L1Loss(), nn.MSELoss()


def test_a_single_loss_is_itself():
    assert combine(L2, OUT, TARGET).item() == 2.5
    assert combine(L2, OUT, TARGET, 2.0).item() == 5.0


@pytest.mark.parametrize("form", [tuple, list])
def test_a_sequence_of_losses_is_summed_and_named(form):
    parts = combine(form([L1, L2]), OUT, TARGET, [1.0, 0.5])
    assert {name: value.item() for name, value in parts.items()} == {
        "loss": 1.5 + 0.5 * 2.5,
        "loss/L1Loss": 1.5,
        "loss/MSELoss": 2.5,
    }


def test_losses_of_one_kind_are_numbered():
    assert list(combine((L2, L2), OUT, TARGET)) == ["loss", "loss/MSELoss_0", "loss/MSELoss_1"]


def test_a_dict_takes_outputs_and_targets_by_key_or_shares_one():
    parts = combine({"a": L1, "b": L2}, {"a": OUT, "b": 2 * OUT}, TARGET)
    assert parts["loss/a"].item() == 1.5
    assert parts["loss/b"].item() == 2.0
    assert parts["loss"].item() == 3.5


def test_gradients_flow_through_the_weighted_sum():
    out = OUT.clone().requires_grad_()
    total = combine({"a": L1, "b": L2}, out, TARGET, {"a": 0.0, "b": 3.0})["loss"]
    total.backward()
    assert out.grad is not None
    assert torch.allclose(out.grad, 3 * (OUT - TARGET))


@pytest.mark.parametrize(
    ("criterion", "outputs", "weights", "words"),
    [
        ((L1, L2), (OUT, OUT, OUT), None, "2 losses but 3 outputs"),
        ({"a": L1, "colour": L2}, {"a": OUT}, None, "the loss 'colour' finds no outputs of that name, only a"),
        ((L1, L2), OUT, [1.0], "1 loss_weights for 2 losses"),
        ({"a": L1}, OUT, {"b": 1.0}, "loss_weights are given for b, the losses are a"),
    ],
)
def test_what_does_not_fit_names_itself(criterion, outputs, weights, words):
    with pytest.raises(UserError, match=words):
        combine(criterion, outputs, TARGET, weights)
