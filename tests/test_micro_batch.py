"""The largest micro-batch that fits: found, agreed upon, recorded. Where there is no GPU its memory is pretended."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from configs.arguments import make_config
from configs.errors import ConfigError
from configs.yaml_file import read_yaml
from scripts.wiring import build_data
from tests.bn_net import BatchNormNet
from tests.conftest import ROOT
from trainer import micro_batch
from trainer.device import make_accelerator


class SmallMemory(BatchNormNet):
    """As on a GPU that holds five images."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if len(images_BCHW) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return super().forward(images_BCHW)


@pytest.mark.parametrize(
    ("share", "holds", "found"),
    [
        (32, 32, 32),
        (32, 31, 16),
        (32, 12, 12),
        (32, 11, 8),
        (33, 20, 18),
        (33, 33, 33),
        (7, 1, 0),
        (6, 3, 2),
        (1, 1, 1),
    ],
)
def test_the_largest_part_of_a_share_that_fits_is_taken(share, holds, found):
    """Parts of about one size, even where that can be."""
    tried = []
    assert micro_batch.largest(share, lambda size: tried.append(size) or size <= holds) == found
    assert len(tried) <= 5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_trying_leaves_the_model_as_it_was(optimizer):
    model = SmallMemory(num_classes=3, in_channels=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, accelerator = make_config(optimizer=optimizer, ema_decay=0.9), make_accelerator(make_config())
    fit = [micro_batch.fits(config, model, (1, 8, 8), size, accelerator) for size in (8, 6, 5, 4)]
    assert fit == [False, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_gpu_it_is_refused(tmp_path):
    config = make_config(auto_micro_batch=True, output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="tries what the memory of a GPU holds, which does not work on cpu"):
        micro_batch.found_or_recorded(config, BatchNormNet(3), (3, 8, 8), make_accelerator(config))


@pytest.mark.parametrize(
    ("dataset", "words"),
    [("digit_scenes", "depends on their boxes"), ("digit_captions", "that the contrastive loss needs whole")],
)
def test_where_images_alone_do_not_tell_it_is_refused(dataset, words):
    config = make_config(dataset=dataset, auto_micro_batch=True)
    with pytest.raises(ConfigError, match=words):
        build_data(config, shown=False)


DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
from trainer import micro_batch
holds = int(sys.argv.pop(1)) * (1 + int(os.environ.get("RANK", "0")))
micro_batch.check_memory_can_be_tried = lambda accelerator: None
micro_batch.fits = lambda config, model, images, size, accelerator: size <= holds
from scripts.train import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_processes_agree_on_it_and_a_run_keeps_it(tmp_path):
    """The process with the smaller memory decides; another memory later changes nothing."""
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    flags = "--auto_micro_batch --batch_size 64 --max_steps 4 --experiment_name x --output_dir".split()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    said = []
    for launch, holds, stop in ((launcher, 8, ["--stop_after_steps", "2"]), ([], 64, [])):
        command = [sys.executable, *launch, str(tmp_path / "driver.py"), str(holds), *flags, str(tmp_path), *stop]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
        assert read_yaml(tmp_path / "x" / "config.yaml")["micro_batch_size"] == 8, done.stderr
        said.append(done.stdout)
    assert "2 process(es) x 4 x 8" in said[0]
    assert "1 process(es) x 8 x 8" in said[1]
    assert json.loads((tmp_path / "x" / "status.json").read_text())["step"] == 4
