"""The loop of MainTrainer against hand-written ones: python tests/benchmarks/loop.py

Same model (MLP 64-64-10), batches of 32 from a list, fused AdamW, clip 1.0, cosine per step, one thread, rounds
interleaved in one process. `bare` computes no metrics. `careful` reads loss and accuracy with .item() every step.
MainTrainer keeps loss and accuracy and writes metrics.jsonl every 50 steps. Only ratios of one run mean something.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from configs.arguments import make_config
from models import BaseModel
from trainer import starting
from trainer.main_trainer import MainTrainer

LR, CLIP = 1e-3, 1.0


class MLP(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    @property
    def dim(self) -> int:
        return 64

    def init_weights(self) -> None:
        pass

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.layers(images_BCHW)


def raw_epoch(batches: list[Any], steps: int, *, careful: bool) -> float:
    """Seconds of a loop as one writes it by hand."""
    model = MLP().train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    criterion = nn.CrossEntropyLoss()
    loss_sum = hits = samples = 0.0
    start = time.perf_counter()
    for images, labels in batches:
        logits = model(images)
        loss = criterion(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if careful:
            loss_sum += loss.item() * len(labels)
            hits += (logits.argmax(1) == labels).sum().item()
            samples += len(labels)
    return time.perf_counter() - start


def trainer_epoch(batches: list[Any], steps: int, folder: str, extra: dict[str, Any]) -> float:
    config = make_config(
        lr=LR,
        grad_clip=CLIP,
        max_steps=steps,
        batch_size=32,
        log_every=50,
        cpu_threads=1,
        output_dir=folder,
        **extra,
    )
    model = MLP()
    model.classes = [str(number) for number in range(10)]
    trainer = MainTrainer(config, model, batches)
    starting.open_run(trainer)
    start = time.perf_counter()
    trainer.train_epoch(batches)
    seconds = time.perf_counter() - start
    trainer.run.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = [(torch.randn(32, 64), torch.randint(0, 10, (32,))) for _ in range(arguments.steps)]
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "bare": lambda: raw_epoch(batches, arguments.steps, careful=False),
            "careful": lambda: raw_epoch(batches, arguments.steps, careful=True),
            "MainTrainer": lambda: trainer_epoch(batches, arguments.steps, folder, {}),
        }
        for loop in loops.values():
            loop()  # warm-up
        rounds = [{name: loop() for name, loop in loops.items()} for _ in range(arguments.rounds)]
    for name in loops:
        micros = min(times[name] for times in rounds) / arguments.steps * 1e6
        print(f"{name:<12} {micros:7.1f} us a step, the best of {arguments.rounds} rounds")
    for other in ("careful", "bare"):
        ratios = [times["MainTrainer"] / times[other] for times in rounds]
        best = min(t["MainTrainer"] for t in rounds) / min(t[other] for t in rounds)
        print(f"MainTrainer / {other}: {statistics.median(ratios):.3f} (median of rounds), {best:.3f} (best rounds)")


if __name__ == "__main__":
    main()
