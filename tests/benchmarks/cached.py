"""Batches of CIFAR-10 from `--cache ram` against loops as they are written: python tests/benchmarks/cached.py

Batches of 256, shuffled, random crop with a padding of 4, horizontal flip; no model. `samples` is the usual pipeline:
a Hugging Face dataset with torchvision transforms, two loader processes, normalised floats. `by hand` is a batched
loop in torch: all images in memory as uint8, padded once, a batch gathered at once. `windows` is the fastest one we
know, in numpy. `ours` is the train loader of a run. All three deliver uint8. Epochs are interleaved in one process
after one to warm up; building the cache, opening the datasets and starting the processes are not counted. Only ratios
of one run mean something.

Generated pictures where ../shared/data/cifar10 is missing.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from configs.arguments import make_config
from data.dataset import load_data, with_cache
from data.loader import train_loader

CIFAR = ROOT.parent / "shared" / "data" / "cifar10"
BATCH, SIZE, PADDING = 256, 32, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def per_sample(folder: Path) -> Iterable[Any]:
    """As the guides of datasets and torchvision write it."""
    from datasets import load_dataset

    transform = v2.Compose(
        [
            v2.RandomCrop(SIZE, padding=PADDING),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"images": [transform(image.convert("RGB")) for image in rows["img"]], "labels": rows["label"]}

    return torch.utils.data.DataLoader(
        load_dataset(str(folder), split="train").with_transform(transformed),  # type: ignore[arg-type]
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )


class ByHand:
    """A loop of its own over images in memory, in torch."""

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor):
        padded = torch.nn.functional.pad(images_NCHW, [PADDING] * 4)
        self.width = padded.shape[3]
        self.pixels_NCP, self.labels_N = padded.flatten(2), labels_N
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        along = torch.arange(SIZE)
        for ids in torch.randperm(len(self.labels_N), generator=self.generator).split(BATCH):
            tops, lefts = torch.randint(0, 2 * PADDING + 1, (2, len(ids), 1), generator=self.generator)
            flips = torch.rand(len(ids), 1, generator=self.generator) < 0.5
            columns = lefts + torch.where(flips, along.flip(0), along)
            places = ((tops + along)[:, :, None] * self.width + columns[:, None, :]).flatten(1)
            pixels = self.pixels_NCP[ids].gather(2, places[:, None].expand(-1, 3, -1))
            yield pixels.unflatten(2, (SIZE, SIZE)), self.labels_N[ids]


class Windows:
    """The same in numpy, by strides instead of indices."""

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor):
        edges = ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING))
        padded = np.pad(images_NCHW.numpy(), edges)
        self.windows = np.lib.stride_tricks.sliding_window_view(padded, (SIZE, SIZE), axis=(2, 3))
        self.labels_N, self.generator = labels_N, np.random.default_rng(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.generator.permutation(len(self.labels_N))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            ids = order[start : start + BATCH]
            tops, lefts = self.generator.integers(0, 2 * PADDING + 1, (2, BATCH))
            pixels = self.windows[ids, :, tops, lefts]
            flips = self.generator.random(BATCH) < 0.5
            pixels[flips] = pixels[flips][..., ::-1]
            yield torch.from_numpy(pixels), self.labels_N[torch.from_numpy(ids)]


def images_per_second(loader: Iterable[Any]) -> float:
    batches, start = 0, time.perf_counter()
    for _ in loader:
        batches += 1
    return batches * BATCH / (time.perf_counter() - start)


def prepare(folder: Path, shards: int) -> None:
    """The first files of CIFAR-10, or generated ones."""
    for number in range(shards):
        name = f"train-{number:05d}-of-00008.parquet"
        if (CIFAR / name).is_file():
            (folder / name).symlink_to(CIFAR / name)
        else:
            generate(folder / name, number)


def generate(path: Path, seed: int) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    generator = np.random.default_rng(seed)
    cells, labels = [], (np.arange(6250) % 10).tolist()
    for _ in labels:
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((SIZE, SIZE)).save(file, "JPEG")
        cells.append({"bytes": file.getvalue(), "path": None})
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=[str(number) for number in range(10)])})
    Dataset.from_dict({"img": cells, "label": labels}, features=features).to_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=int, default=2, help="of 6,250 images; at most 8")
    parser.add_argument("--epochs", type=int, default=5, help="of the fast loops in a round")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = str(Path(temporary) / "datasets")  # read by datasets when it is imported
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        prepare(folder, arguments.shards)
        config = make_config(
            dataset=str(folder),
            image_size=SIZE,
            cache="ram",
            batch_size=BATCH,
            micro_batch_size=BATCH,
            augment="default",
            num_workers=None,
        )
        start = time.perf_counter()
        data = with_cache(load_data(config), config, shown=False)
        seconds = time.perf_counter() - start
        source: Any = data.train.source
        print(f"{len(source.labels):,} images; the datasets opened and the cache built in {seconds:.1f} s")
        loaders: dict[str, tuple[Iterable[Any], int]] = {
            "samples": (per_sample(folder), 1),
            "by hand": (ByHand(source.images_NCHW, torch.from_numpy(source.labels)), arguments.epochs),
            "windows": (Windows(source.images_NCHW, torch.from_numpy(source.labels)), arguments.epochs),
            "ours": (train_loader(config, data), arguments.epochs),
        }
        speed: Callable[[str], float] = lambda name: statistics.median(  # noqa: E731
            images_per_second(loaders[name][0]) for _ in range(loaders[name][1])
        )
        for name in loaders:
            images_per_second(loaders[name][0])  # warm-up
        rounds = [{name: speed(name) for name in loaders} for _ in range(arguments.rounds)]
    for name in loaders:
        print(f"{name:<8} {statistics.median(speeds[name] for speeds in rounds):10,.0f} images a second")
    for other in ("samples", "by hand", "windows"):
        ratios = [speeds["ours"] / speeds[other] for speeds in rounds]
        print(f"ours / {other}: {statistics.median(ratios):.2f} (median of {len(rounds)} rounds)")


if __name__ == "__main__":
    main()
