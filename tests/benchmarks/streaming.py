"""Streams of parquet into batches: python tests/benchmarks/streaming.py

`datasets` is load_dataset(streaming=True) as one writes it: shuffle(buffer_size=1000), images decoded by datasets, v2
transforms, float and Normalize in the loader process, default collate. `ours` is the project's train_loader with
--streaming. As many loader processes on both sides, one thread each; timed from the first batch on. Then what it
costs to begin in the middle, for each row that is skipped. Rounds are interleaved: only ratios of one run mean
something.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from configs.arguments import make_config
from configs.dataset_info import IMAGENET_MEAN, IMAGENET_STD
from data.dataset import load_data
from data.labels import ClassLabels
from data.loader import train_loader
from data.sequential import SequentialStream

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BATCH = 64


def save_photographs(folder: Path, rows: int) -> Path:
    """Photographs of 640x480 in four parquet files with row groups of 50."""
    real = datasets.load_dataset(str(SHARED / "bccd"), split="train").cast_column("image", datasets.Image(decode=False))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    cells = [real[number % len(real)]["image"] for number in range(rows)]
    columns = {"image": cells, "label": [number % 2 for number in range(rows)]}
    table = datasets.Dataset.from_dict(columns, features=features)
    for number in range(4):
        table.shard(4, number).to_parquet(folder / f"train-{number:05d}-of-00004.parquet", batch_size=50)
    return folder


def usual_loader(folder: Path, image: str, workers: int, size: int) -> DataLoader:
    crop = v2.RandomCrop(size, padding=4) if size <= 64 else v2.RandomResizedCrop(size, antialias=True)
    transform = v2.Compose(
        [
            crop,
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack([transform(row[image].convert("RGB")) for row in rows])
        return images, torch.tensor([row["label"] for row in rows])

    table = datasets.load_dataset(str(folder), split="train", streaming=True).shuffle(seed=0, buffer_size=1000)
    return DataLoader(table, batch_size=BATCH, num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]


def our_loader(folder: Path, workers: int, size: int) -> Any:
    config = make_config(
        dataset=str(folder),
        streaming=True,
        batch_size=BATCH,
        num_workers=workers,
        image_size=size,
        split=(1.0, 0.0, 0.0),
    )
    return train_loader(config, load_data(config))


def images_per_second(loader: Iterable[Any], batches: int) -> float:
    """From the first batch on, which the start of the loader processes is left out with."""
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return BATCH * batches / (time.perf_counter() - start)


def compare(title: str, folder: Path, image: str, size: int, workers: int, batches: int, rounds: int) -> None:
    rates: dict[str, list[float]] = {"datasets": [], "ours": []}
    for _ in range(rounds):
        rates["datasets"].append(images_per_second(usual_loader(folder, image, workers, size), batches))
        rates["ours"].append(images_per_second(our_loader(folder, workers, size), batches))
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["datasets"])]
    print(
        f"{title:<28} datasets {statistics.median(rates['datasets']):7,.0f} images/s   "
        f"ours {statistics.median(rates['ours']):7,.0f}   ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )


def skipping(folder: Path, image: str) -> None:
    """Microseconds for each row skipped by a resume."""
    config = make_config(dataset=str(folder), streaming=True, batch_size=BATCH, num_workers=0, split=(1.0, 0.0, 0.0))
    loader = train_loader(config, load_data(config))

    def seconds_to_first(step: int) -> float:
        loader.set_position(0, step)
        start = time.perf_counter()
        next(iter(loader))
        return time.perf_counter() - start

    steps = loader.steps_per_epoch - 1
    seconds_to_first(0)
    late = statistics.median(seconds_to_first(steps) for _ in range(5))
    early = statistics.median(seconds_to_first(0) for _ in range(5))
    print(f"row counts known: the first batch after {steps * BATCH:,} skipped rows takes {late * 1e3:.0f} ms, of an")
    print(
        f"epoch's beginning {early * 1e3:.0f} ms: {(late - early) * 1e6 / (steps * BATCH):.2f} us for each row skipped"
    )
    table = datasets.load_dataset(str(folder), split="train", streaming=True)
    stream = SequentialStream(table, image, ClassLabels(["0"] * 10, ("label",)), "x", remote=False)
    start = time.perf_counter()
    count = sum(len(chunk) for chunk in stream.chunks(0, 0, None, 2048))
    cost = (time.perf_counter() - start) * 1e6 / count
    print(f"row counts not known: {cost:.0f} us for each row skipped, undecoded", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="loader processes on both sides")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"needs the photographs and CIFAR-10 of {SHARED}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        photographs = save_photographs(Path(temporary), 1640)
        compare("photographs of 640x480", photographs, "image", 224, arguments.workers, 20, arguments.rounds)
    compare("CIFAR-10 as JPEG 32x32", SHARED / "cifar10", "img", 32, arguments.workers, 200, arguments.rounds)
    skipping(SHARED / "cifar10", "img")


if __name__ == "__main__":
    datasets.disable_progress_bars()
    main()
