"""From JPEG files to batches of 224x224, in one loader process of one thread: python tests/benchmarks/decode.py

`decode alone` is torchvision's decoder and nothing after it. `usual` is the common pipeline: PIL, RandomResizedCrop,
flip, float and Normalize in the worker, default collate. `ours` cuts and resizes uint8 by data/decode.py and
data/geometry.py; `train_loader` is the project's whole loader on a folder of the same files. The photographs are of
about 640x480 and of 12 megapixels. Rounds are interleaved: only ratios of one run mean something.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from configs.arguments import make_config
from configs.dataset_info import IMAGENET_MEAN, IMAGENET_STD
from data.dataset import load_data
from data.decode import decode
from data.geometry import Geometry
from data.loader import train_loader
from data.order import Use, mix_ids

SIZE = 224
PHOTOGRAPHS = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd" / "train-00000-of-00001.parquet"


class Files(Dataset):
    """Each file's bytes, made into something by a function of them and of the sample's number."""

    def __init__(self, paths: list[Path], make: Callable[[bytes, int], Any]):
        self.paths, self.make = paths, make

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Any:
        return self.make(self.paths[place].read_bytes(), place)


class Squares(Files):
    """uint8 [B, 3, 224, 224], as the project makes them."""

    geometry = Geometry("random", SIZE, flip=True)

    def __init__(self, paths: list[Path]):
        super().__init__(paths, lambda data, place: place)

    def __getitems__(self, places: list[int]) -> Tensor:
        keys = mix_ids(0, Use.AUGMENT, 0, ids=np.array(places))
        images = [
            decode(self.paths[place].read_bytes(), str(self.paths[place]), 3, self.geometry.plan(int(key)))
            for place, key in zip(places, keys)
        ]
        return self.geometry.move(torch.stack(images), keys)


usual_steps = v2.Compose(
    [
        v2.RandomResizedCrop(SIZE, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
)


def usual(data: bytes, place: int) -> Tensor:
    return usual_steps(Image.open(io.BytesIO(data)).convert("RGB"))


def decode_alone(data: bytes, place: int) -> int:
    return len(decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)  # of decode_jpeg


def loader(dataset: Files, batch_size: int, collate: Any = None) -> DataLoader:
    return DataLoader(
        dataset, batch_size, num_workers=1, persistent_workers=True, worker_init_fn=one_thread, collate_fn=collate
    )


def as_it_is(batch: Any) -> Any:
    return batch


def blood_cells() -> list[bytes]:
    """205 photographs of 640x480 (BCCD, MIT licence), blurred ones of 20 kB; none where they are absent."""
    if not PHOTOGRAPHS.is_file():
        return []
    import pyarrow.parquet

    column = pyarrow.parquet.read_table(PHOTOGRAPHS, columns=["image"])["image"]
    return [cell["bytes"] for cell in column.to_pylist()]


def photographs() -> list[bytes]:
    """Two of 640x427, as scikit-learn ships them: 143 and 197 kB."""
    return [path.read_bytes() for path in sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))]


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def large_photographs(small: list[bytes], count: int = 8) -> list[bytes]:
    """4000x3000, of 5x5 small ones enlarged a little."""
    large = []
    for number in range(count):
        board = Image.new("RGB", (3200, 2400))
        for tile in range(25):
            place = ((tile % 5) * 640, (tile // 5) * 480)
            board.paste(Image.open(io.BytesIO(small[(number * 25 + tile) % len(small)])), place)
        large.append(jpeg(board.resize((4000, 3000), Image.Resampling.BICUBIC)))
    return large


def written(files: list[bytes], folder: Path) -> list[Path]:
    """As an image folder of two classes."""
    paths = [folder / f"class_{number % 2}" / f"{number:04}.jpg" for number in range(len(files))]
    for path, file in zip(paths, files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    return paths


def project_loader(folder: Path, batch_size: int) -> Iterable[Any]:
    config = make_config(
        train_data_dir=str(folder), image_size=SIZE, num_workers=1, batch_size=batch_size, split=(0.9, 0.1, 0.0)
    )
    return train_loader(config, load_data(config))


def images_a_second(batches: Iterable[Any]) -> float:
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch["ids"] if isinstance(batch, dict) else batch)
    return images / (time.perf_counter() - start)


def compare(title: str, folder: Path, paths: list[Path], batch_size: int, rounds: int) -> None:
    loaders: dict[str, Iterable[Any]] = {
        "decode alone": loader(Files(paths, decode_alone), batch_size),
        "usual": loader(Files(paths, usual), batch_size),
        "ours": loader(Squares(paths), batch_size, as_it_is),
        "train_loader": project_loader(folder, batch_size),
    }
    for batches in loaders.values():
        images_a_second(batches)  # warm-up: starts the process
    speeds = [{name: images_a_second(batches) for name, batches in loaders.items()} for _ in range(rounds)]
    print(f"{title}: {len(paths)} files of {statistics.mean(p.stat().st_size for p in paths) / 1000:.0f} kB")
    for name in loaders:
        ratios = [statistics.median(s[name] / s[other] for s in speeds) for other in ("usual", "decode alone")]
        speed = statistics.median(s[name] for s in speeds)
        print(f"  {name:<13} {speed:7.1f} images/s   {ratios[0]:5.2f} of usual   {ratios[1]:5.2f} of decode alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells, photos = blood_cells(), photographs()
    smaller = [jpeg(Image.open(io.BytesIO(photo)), quality=95) for photo in photos]
    kinds = {
        "640x427, photographs": (photos * 400, 64),
        "640x427, the same in quality 95": (smaller * 400, 64),
        "640x480, blood cells": (cells * 4, 64),
        "12 megapixels": (large_photographs(cells or photos) * 4, 4),
    }
    with tempfile.TemporaryDirectory() as folder:
        for title, (files, batch_size) in kinds.items():
            if files:
                root = Path(folder) / title
                compare(title, root, written(files, root), batch_size, arguments.rounds)


if __name__ == "__main__":
    main()
