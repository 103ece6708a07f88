"""What only GPUs can show: processes that talk over NCCL compute what one computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import FSDP, ROOT
from tests.gpu import NEEDS_GPU
from tests.test_scale import check_alike

pytestmark = NEEDS_GPU

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA GPUs are at hand")

FLAGS = (
    "--model bn_net --dropout 0.2 --dtype float64 --max_steps 12 --batch_size 32 --micro_batch_size 16 --mixup 0.2 "
    "--ema_decay 0.9 --grad_clip --trace_samples --log_every 3 --save_every_steps 12"
).split()


def launched(folder: Path, name: str, *flags: str, processes: int | None = 1, sharded: bool = False) -> Path:
    """A run of `processes` that torchrun starts; None: of one that knows of no others."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes else []), "tests/bn_net.py", *FLAGS, *flags]
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    environment["OMP_NUM_THREADS"] = "1"
    if sharded:
        environment |= {key: value for key, value in FSDP.items() if key != "FSDP_ON_CPU"}
    done = subprocess.run(
        [*command, "--output_dir", str(folder), "--experiment_name", name],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("sharded by FSDP2" in done.stdout) == sharded
    assert json.loads((folder / name / "env.json").read_text())["device"].startswith("cuda")
    return folder / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return launched(tmp_path_factory.mktemp("runs"), "alone", processes=None)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=two_gpus)])
def test_ddp_and_fsdp2_are_one_process(alone, processes, sharded):
    check_alike(alone, launched(alone.parent, f"{processes}_{sharded}", processes=processes, sharded=sharded), 1e-9)


@pytest.mark.parametrize(("processes", "micro"), [(1, 32), pytest.param(2, 16, marks=two_gpus)])
def test_synced_batch_norm_is_that_of_all_that_is_computed_at_once(alone, processes, micro):
    at_once = "--dropout 0 --micro_batch_size".split()
    plain = launched(alone.parent, f"plain_{processes}", *at_once, "32", processes=None)
    synced = launched(
        alone.parent, f"synced_{processes}", *at_once, str(micro), "--sync_batch_norm", processes=processes
    )
    check_alike(plain, synced, 1e-6)
