from __future__ import annotations

import pytest
import torch

from trainer.mixing import mix_pairs


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_does_not_depend_on_the_micro_batch_and_keeps_the_balance(mixup, cutmix):
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(12) % 4
    options = {"num_classes": 4, "mixup": mixup, "cutmix": cutmix, "seed": 3, "step": 5, "batch_size": 12}
    mixed, targets = mix_pairs(images, labels, offset=0, **options)
    for offset, size in ((0, 4), (4, 6), (10, 2)):
        part = slice(offset, offset + size)
        pixels, shares = mix_pairs(images[part], labels[part], offset=offset, **options)
        assert torch.equal(pixels, mixed[part])
        assert torch.equal(shares, targets[part])
    assert torch.allclose(targets.sum(1), torch.ones(12))
    pairs = mixed.unflatten(0, (6, 2)).sum(1), (images.float() / 255).unflatten(0, (6, 2)).sum(1)
    assert torch.allclose(*pairs, atol=1e-5)  # what one sample gives, its partner takes
    assert not torch.equal(mixed, mix_pairs(images, labels, offset=0, **(options | {"step": 6}))[0])


def test_cutmix_targets_are_shares_of_area():
    images = torch.stack([torch.zeros(1, 10, 10), torch.ones(1, 10, 10)]).repeat(20, 1, 1, 1)
    labels = torch.tensor([0, 1]).repeat(20)
    options = {"num_classes": 2, "mixup": 0.0, "cutmix": 1.0, "seed": 0, "step": 0, "offset": 0, "batch_size": 40}
    mixed, targets = mix_pairs(images, labels, **options)
    assert torch.allclose(mixed.mean((1, 2, 3)), targets[:, 1], atol=1e-6)
    assert 0.2 < targets[::2, 1].mean() < 0.8
