"""--mixed_precision on a CPU, task by task: the model computes in bf16, what leaves it is float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._pytree import tree_leaves

from configs.arguments import make_config
from data import digit_captions, digit_scenes
from scripts.wiring import build_trainer


@pytest.fixture
def an_accelerator_of_its_own(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "digits"},
        {"dataset": "digit_ink", "loss_weights": ("learnt",)},
        {"dataset": "digit_captions"},
        {"dataset": "digit_scenes"},
        # with 64 px, its last convolution has one pixel, for which torch's gradient in bf16 is at times NaN on a CPU
        {"dataset": "digit_scenes", "model": "fcos/resnet18", "image_size": 96},
        pytest.param({"dataset": "digit_scenes", "model": "fasterrcnn/resnet18"}, marks=pytest.mark.long),
    ],
    ids=lambda options: "-".join(options[name] for name in ("dataset", "model") if name in options),
)
def test_outputs_and_losses_are_float32(tmp_path, monkeypatch, an_accelerator_of_its_own, options):
    monkeypatch.setattr(digit_scenes, "SCENES", {"train": 8, "val": 4, "test": 1})
    monkeypatch.setattr(digit_captions, "SCENES", {"train": 40, "val": 4, "test": 1})
    config = make_config(
        **options, mixed_precision="bf16", batch_size=4, max_steps=2, num_workers=0, cpu_threads=1, augment="none",
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer, _, _ = build_trainer(config)
    given, inside, step = [], set(), trainer.forward_pass

    def noted(batch):
        given.append(step(batch))
        return given[-1]

    trainer.forward_pass = noted
    for module in trainer.plain_model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: inside.add(output.dtype))
    trainer.train_epoch(trainer.train_loader)
    trainer.validate_epoch(trainer.val_loader)
    found = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    assert len(found) > 4
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert inside == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.parameters} == {torch.float32}
    assert trainer.grad_norm.isfinite()
