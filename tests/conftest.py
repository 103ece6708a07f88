"""What tests share: tiny runs in this process, and real commands in fresh ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def run_script(
    name: str, *flags: Any, rc: int = 0, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A script in a fresh process; fails with all that it said where its exit code is another."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, flags)]
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet | (env or {}), cwd=cwd)
    assert done.returncode == rc, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def lines_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of these kinds or all but speed."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if (line["kind"] in kinds if kinds else line["kind"] != "speed")]


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
