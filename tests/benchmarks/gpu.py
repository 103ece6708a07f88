"""MainTrainer against a loop written by hand, on one GPU: python tests/benchmarks/gpu.py

Both train the same model (ResNet-50, 224 px, bf16, compiled, channels last, fused AdamW, cosine per step) in one
process, in turns. The hand-written loop computes no metrics; MainTrainer logs loss and accuracy every ten steps. Its
next batch travels while this one is computed on; the hand-written loop copies each batch when it needs it.
Synthetic input are uint8 batches in pinned memory; real input are JPEG files through data/loader.py, for both.
Writes tests/benchmarks/results/DEVICE.md. `--device cpu --model resnet18 --image_size 64 --batch_size 8 --steps 3
--rounds 1 --no_compile` tries it where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from torch import nn

from configs.arguments import make_config
from configs.dataset_info import IMAGENET_MEAN, IMAGENET_STD
from configs.options import Config
from data.dataset import load_data
from data.loader import train_loader
from models import BaseModel
from models.model import build
from models.summary import cost
from trainer import mfu, reporting, starting
from trainer.main_trainer import MainTrainer
from trainer.windows import PositionedLoader, as_dict

RESULTS = Path(__file__).parent / "results"
TARGET = 0.98  # of the hand-written loop's images a second
CLASSES = 8  # of the files that are made here


class Round(NamedTuple):
    images_per_second: float
    peak_bytes: int  # beside what lay in memory before
    mfu: float | None = None  # as the log has it


class Measured:
    """Seconds and memory of what happens inside, the device's work included."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def __enter__(self) -> Measured:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        self.peak_bytes = torch.cuda.max_memory_allocated() - self.before if self.on_gpu else 0


class RawLoop:
    """As one writes it by hand."""

    def __init__(self, model: BaseModel, config: Config, device: torch.device, total_steps: int):
        self.config, self.device = config, device
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total_steps)
        self.criterion = nn.CrossEntropyLoss()
        if config.compile:
            self.model.compile()

    def run(self, batches: Iterable[Any], number: int) -> Round:
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision == "bf16")
        steps, samples = self.config.stop_after_steps, 0
        if isinstance(batches, PositionedLoader):
            batches.set_position(number, 0)
        with Measured(self.device) as measured:
            for batch in map(as_dict, itertools.islice(batches, steps)):
                images = batch["images_BCHW"].to(self.device, non_blocking=True)
                labels = batch["labels"].to(self.device, non_blocking=True)
                images = images.to(memory_format=torch.channels_last)
                with autocast:
                    loss = self.criterion(self.model(images), labels)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
                samples += len(labels)
        return Round(samples / measured.seconds, measured.peak_bytes)


class OurLoop:
    def __init__(self, model: BaseModel, config: Config, batches: Iterable[Any], flops: tuple[float, float]):
        self.trainer = MainTrainer(config, model, batches)
        self.trainer.forward_flops = flops
        self.logged: list[dict[str, Any]] = []
        starting.open_run(self.trainer)

    def run(self, batches: Iterable[Any], number: int) -> Round:
        trainer, state = self.trainer, self.trainer.state
        state.epoch, state.step_in_epoch, state.epoch_sums, trainer.session_steps = number, 0, {}, 0
        before = state.step
        with Measured(trainer.device) as measured:
            trainer.train_epoch(batches)
        trainer.clock.stop()
        reporting.log_speed(trainer)
        used = reporting.utilization(trainer, trainer.clock.speed()["samples_per_second"])
        images = (state.step - before) * trainer.config.batch_size
        return Round(images / measured.seconds, measured.peak_bytes, used)


def compare(config: Config, model_of: Any, batches: Iterable[Any], rounds: int, flops: tuple[float, float]) -> str:
    """A row of the table."""
    ours = OurLoop(model_of(), config, batches, flops)
    device = ours.trainer.device
    raw = RawLoop(model_of(), config, device, config.stop_after_steps * (rounds + 1))  # type: ignore[operator]
    results: list[tuple[Round, Round]] = []
    for number in range(rounds + 1):  # the first warms up
        results.append((raw.run(batches, number), ours.run(batches, number)))
        print(f"round {number}: {results[-1][0].images_per_second:,.1f} by hand, "
              f"{results[-1][1].images_per_second:,.1f} MainTrainer, images a second", flush=True)  # fmt: skip
    ours.trainer.run.close()
    theirs, mine = zip(*results[1:])
    ratio = statistics.median(b.images_per_second / a.images_per_second for a, b in zip(theirs, mine))
    speeds = [statistics.median(one.images_per_second for one in loop) for loop in (theirs, mine)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    peaks = mfu.peaks(name, mfu.precisions(str(config.mixed_precision), config.dtype))
    by_log = statistics.median(one.mfu for one in mine) if peaks else None
    by_hand = 3 * sum(flops) * speeds[1] / peaks[0] if peaks and peaks[0] == peaks[1] else None
    memory = [max(one.peak_bytes for one in loop) / 1e9 for loop in (theirs, mine)]
    shown = [f"{share:.1%}" if share is not None else "-" for share in (by_log, by_hand)]
    return (
        f"{speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratio:.3f} | {shown[0]} | {shown[1]} | "
        f"{memory[0]:.2f} GB | {memory[1]:.2f} GB"
    )


def synthetic(count: int, batch_size: int, image_size: int) -> list[Any]:
    """`count` batches, eight of them different."""
    generator = torch.Generator().manual_seed(0)
    shape = batch_size, 3, image_size, image_size
    made = [
        (
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            torch.randint(0, 1000, (batch_size,), generator=generator),
        )
        for _ in range(min(8, count))
    ]
    if torch.cuda.is_available():
        made = [(images.pin_memory(), labels.pin_memory()) for images, labels in made]
    return [made[number % len(made)] for number in range(count)]


def make_files(folder: Path, count: int) -> None:
    """`count` JPEG files of 500x375 in class folders, 64 of them different."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class_{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < 64:
            coarse = generator.integers(0, 256, (47, 63, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            os.link(folder / f"class_{number % 64 % CLASSES}" / f"{number % 64:06d}.jpg", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="of each loop in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--train_data_dir", help="image folder for the real input; default: files made here")
    parser.add_argument("--num_workers", type=int, help="default: the cores less one, at most 8")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif not torch.cuda.is_available():
        parser.error("no CUDA GPU is at hand: --device cpu tries the script, and measures nothing of use")
    with tempfile.TemporaryDirectory() as folder:
        report(arguments, Path(folder))


def report(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure both inputs, print and write the table."""
    size, steps = arguments.image_size, arguments.steps
    common = {
        "model": arguments.model,
        "image_size": size,
        "batch_size": arguments.batch_size,
        "micro_batch_size": arguments.batch_size,
        "mixed_precision": arguments.precision,
        "compile": not arguments.no_compile,
        "channels_last": True,
        "lr": 1e-3,
        "epochs": arguments.rounds + 1,
        "stop_after_steps": steps,
        "num_workers": arguments.num_workers,
        "output_dir": str(folder / "runs"),
    }

    def model_of() -> BaseModel:
        torch.manual_seed(0)
        model = build(arguments.model, num_classes=1000, in_channels=3, image_size=size)
        classes = [str(number) for number in range(1000)]
        model.describe(task="classification", classes=classes, image_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return model

    found = cost(model_of(), 3, size, min(8, arguments.batch_size))
    flops = found.convolution_flops, found.flops - found.convolution_flops
    images = arguments.train_data_dir
    if images is None:
        images = str(folder / "images")
        make_files(Path(images), int(arguments.batch_size * (steps + 1) / 0.9) + 100)
    real = make_config(**common, train_data_dir=images, split=(0.9, 0.1, 0.0))
    inputs = {
        "synthetic": (make_config(**common), synthetic(steps, arguments.batch_size, size)),
        "JPEG files": (real, train_loader(real, load_data(real))),
    }
    rows = []
    for name, (config, batches) in inputs.items():
        print(name)
        rows.append(f"| {name} | {compare(config, model_of, batches, arguments.rounds, flops)} |")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    text = "\n".join([
        f"# {device}", "",
        f"`python {shlex.join(sys.argv)}`, torch {torch.__version__}, {date.today()}: {arguments.model}, {size} px, "
        f"batches of {arguments.batch_size}, {arguments.precision}{'' if arguments.no_compile else ', compiled'}, "
        f"channels last; {found.flops / 1e9:.2f} GFLOPs an image; medians of {arguments.rounds} rounds of {steps} "
        "steps.",
        "", "| input | by hand, images/s | MainTrainer, images/s | ratio | MFU in the log | MFU from images/s "
        "| memory by hand | memory MainTrainer |", "|---|---|---|---|---|---|---|---|", *rows, "",
        f"The ratio should be {TARGET} or more.", "",
    ])  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{device.replace(' ', '_').replace('/', '_')}.md"
    file.write_text(text)
    print(f"\n{text}\nwritten to {file}")


if __name__ == "__main__":
    main()
