"""What tests share: tiny runs in this process, and real commands in fresh ones."""

from __future__ import annotations

import os

# Tests run side by side, and each would wait for its threads by spinning on cores that the other needs: two runs at
# once took 52 s, and take 8 s with this. Read when torch is loaded, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, for the tests that are --deterministic

import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from trainer import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """The GPUs are for the tests that ask for them: what others compute is compared with a CPU's last bits."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_script(
    name: str, *flags: Any, rc: int = 0, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A script in a fresh process; fails with all that it said where its exit code is another."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, flags)]
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet | (env or {}), cwd=cwd)
    assert done.returncode == rc, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


# What accelerate_configs/fsdp2.yaml makes of the environment, for tests/bn_net.py.
FSDP = {  # as `accelerate config` sets it, with what it adds without being asked
    "FSDP_ON_CPU": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip


def exit_code_of(work: Callable[[], object]) -> int:
    """Of a forked process that does the work; -9 where it was killed, 1 for an error, which it tells."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(60)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lines_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of these kinds or all but speed."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if (line["kind"] in kinds if kinds else line["kind"] != "speed")]


def same_run(one: Path, other: Path) -> None:
    """Weights, averages, optimizer, state, metrics and sample ids of two finished runs, to the last bit."""
    first, second = (checkpoint.all_checkpoints(run / "checkpoints")[-1] for run in (one, other))
    assert first.name == second.name
    for file in ("model.safetensors", "ema.safetensors", "optimizer.bin"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    states = [checkpoint.read_state(folder) | {"wandb_id": ""} for folder in (first, second)]
    assert states[0] == states[1]
    assert lines_of(one) == lines_of(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for file in ("model.safetensors", "config.json"):
        assert (one / "best" / file).read_bytes() == (other / "best" / file).read_bytes(), file


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of eight grey 12x10 pictures each: dark and bright."""
    generator = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(low, low + 100, (12, 10), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def same_threads() -> None:
    """Sums depend on the number of threads in their last bits."""
    torch.set_num_threads(1)


@pytest.fixture
def gpu_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An Accelerator for each test, float32 that is no tf32, and afterwards all as it was."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.backends.cudnn.allow_tf32 = allowed
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
