"""--use_multigpu: from a plain command to a process for each GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def start_on_all_gpus(argv: list[str]) -> None:
    """Become `accelerate launch` of this command. Returns, with a line, where fewer than two GPUs are visible."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        print(f"note      --use_multigpu: {gpus or 'no'} GPU is visible, one process trains", flush=True)
        return
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(gpus)]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml")]
    os.execv(sys.executable, [*launch, str(ROOT / "scripts" / "train.py"), *argv])
