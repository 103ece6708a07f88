"""bf16 computes inside: what leaves a model, and what is summed, has float32, whatever the task."""

from __future__ import annotations

import pytest
import torch

from tests.tasks import NAMES, prepared, save_pictures
from trainer.losses import total


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("pictures") / "train.parquet", 40)


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("name", NAMES, ids="-".join)
def test_outputs_and_losses_are_float32(name, pictures, tmp_path):
    trainer = prepared(name, pictures, tmp_path / "x", "--mixed_precision bf16")
    inside = set()
    for module in trainer.plain_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, given, output: inside.add(output.dtype))
    batch = trainer.on_device(next(iter(trainer.train_loader)))
    trainer.model.train()
    losses, outputs = trainer.forward_pass(batch)
    total(losses).backward()
    assert inside == {torch.bfloat16}
    assert {t.dtype for t in tensors_in([losses, outputs]) if t.is_floating_point()} == {torch.float32}
    assert {p.grad.dtype for p in trainer.plain_model.parameters() if p.grad is not None} == {torch.float32}
    trainer.model.eval()
    with torch.no_grad():
        _, outputs = trainer.forward_pass(batch)
    assert {t.dtype for t in tensors_in(outputs) if t.is_floating_point()} == {torch.float32}
