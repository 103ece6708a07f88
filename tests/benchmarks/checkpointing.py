"""What --gradient_checkpointing saves and costs: python tests/benchmarks/checkpointing.py [--models NAME ...]

One training step (forward and backward) of each model in float32, with and without, interleaved in one process. Time is
a ratio of the same run; memory is what a step adds to the process at its peak, measured in a process of its own (on
CUDA: as torch counts it).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from models.model import build
from models.recompute import recompute_blocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_of(name: str, image_size: int, *, twice: bool) -> nn.Module:
    torch.manual_seed(0)
    model = build(name, num_classes=100, in_channels=3, image_size=image_size)
    if twice:
        recompute_blocks(model)
    return model.to(DEVICE).train()


def step(model: nn.Module, images_BCHW: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    start = time.perf_counter()
    model(images_BCHW).square().mean().backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_bytes(name: str, image_size: int, batch_size: int, *, twice: bool) -> int:
    """What a step takes at its peak over what lies there before it."""
    model, images_BCHW = model_of(name, image_size, twice=twice), torch.rand(batch_size, 3, image_size, image_size)
    images_BCHW = images_BCHW.to(DEVICE)
    if DEVICE.type == "cuda":
        step(model, images_BCHW)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(model, images_BCHW)
        return torch.cuda.max_memory_allocated() - before
    step(model, images_BCHW[:1])
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    step(model, images_BCHW)
    done.set()
    thread.join()
    return peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_b_16", "convnext_tiny"])
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak_of", choices=["once", "twice"], help="print the peak of the first model and stop")
    arguments = parser.parse_args()
    sizes = arguments.image_size, arguments.batch_size
    if arguments.peak_of:
        print(peak_bytes(arguments.models[0], *sizes, twice=arguments.peak_of == "twice"))
        return
    print(f"batch {arguments.batch_size}, {arguments.image_size} px, {DEVICE.type}")
    for name in arguments.models:
        flags = ["--models", name, "--image_size", str(sizes[0]), "--batch_size", str(sizes[1]), "--peak_of"]
        command = [sys.executable, __file__, *flags]
        once, twice = (
            int(subprocess.run([*command, kind], capture_output=True, text=True, check=True).stdout) / 1e6
            for kind in ("once", "twice")
        )
        models = [model_of(name, sizes[0], twice=twice) for twice in (False, True)]
        images_BCHW = torch.rand(sizes[1], 3, sizes[0], sizes[0], device=DEVICE)
        rounds = [[step(model, images_BCHW) for model in models] for _ in range(arguments.rounds + 1)][1:]
        ratio = statistics.median(second / first for first, second in rounds)
        print(f"{name:<16} a step takes {once:7,.0f} MB, with checkpointing {twice:7,.0f} MB; time {ratio:.2f}")


if __name__ == "__main__":
    main()
