"""Which tests need a GPU; those that do not are given none, see tests/conftest.py."""

from __future__ import annotations

import pytest
import torch

from trainer.device import can_bf16

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is at hand, or `-m gpu` is not given"),
    pytest.mark.usefixtures("gpu_afresh"),
]
NEEDS_BF16 = pytest.mark.skipif(not torch.cuda.is_available() or not can_bf16(), reason="no GPU here computes in bf16")
