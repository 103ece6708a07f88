"""How a cache is filled: every picture of a source decoded, resized and written as it comes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from configs.environment import cores
from configs.errors import DataError
from data.decode import crop_resized, decode
from data.geometry import SMALL, Box, Plan, whole
from data.sources import Source

CHUNK = 32  # pictures a thread takes at once
LIGHT_BYTES = 8192  # mean size of files below which decoding threads only wait for the interpreter's lock


def storage_plan(image_size: int) -> Plan:
    """Small pictures become squares; the shorter side of larger ones shrinks to 8/7 of the image size."""

    def choose(height: int, width: int) -> tuple[Box, tuple[int, int]]:
        if image_size <= SMALL:
            return whole(height, width), (image_size, image_size)
        scale = min(1.0, image_size * 8 // 7 / min(height, width))
        return whole(height, width), (max(1, round(height * scale)), max(1, round(width * scale)))

    return choose


class Writer:
    """Decodes on threads. Each writes its pictures itself, so that few of them are in memory."""

    def __init__(self, source: Source, plan: Plan, path: Path, square: int | None):
        self.source, self.plan, self.path, self.square = source, plan, path, square
        self.index = np.zeros((len(source.labels), 3), np.int64)  # offset, height, width
        self.bad: dict[int, dict[str, str]] = {}
        self.end, self.lock = 0, threading.Lock()

    def write_all(self, threads: int, shown: bool) -> None:
        count = len(self.source.labels)
        chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        bar = tqdm(total=count, desc="cache", unit="image", leave=False, disable=None if shown else True)
        with self.path.open("wb") as self.file, bar, one_torch_thread(), ThreadPoolExecutor(threads) as pool:
            if self.square:
                self.file.truncate(count * self.source.channels * self.square**2)
            for written in pool.map(self.write, chunks):
                bar.update(written)

    def write(self, places: range) -> int:
        """Store some pictures; how many."""
        for place in places:
            try:
                pixels = resized(self.source.read(place), self.source, place, self.plan)
            except DataError as error:
                self.bad[place] = {"what": error.what, "where": error.where, "fix": error.fix}
                continue
            if self.square:
                offset = place * pixels.numel()
            else:
                pixels = pixels.permute(1, 2, 0)
                with self.lock:
                    offset, self.end = self.end, self.end + pixels.numel()
                self.index[place] = offset, *pixels.shape[:2]
            write_at(self.file, pixels, offset)
        return len(places)


def resized(picture: bytes | torch.Tensor, source: Source, place: int, plan: Plan) -> torch.Tensor:
    """uint8 [C, H, W] as it is stored."""
    if isinstance(picture, bytes):
        return decode(picture, source.name(place), source.channels, plan)
    return crop_resized(picture, plan)


def write_at(file: IO[bytes], pixels: torch.Tensor, offset: int) -> None:
    left = pixels.contiguous().view(-1).numpy().data
    while left:
        written = os.pwrite(file.fileno(), left, offset)
        left, offset = left[written:], offset + written


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let no decoding thread start threads of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def forecast(source: Source, plan: Plan) -> tuple[int, int]:
    """How many bytes a cache will take, judged by some of its pictures, and how many threads should decode."""
    count = len(source.labels)
    picture_bytes, pixel_bytes = [LIGHT_BYTES], [0]
    for place in np.linspace(0, count - 1, min(count, CHUNK)).astype(int).tolist():
        with suppress(DataError):
            picture = source.read(place)
            pixel_bytes.append(resized(picture, source, place, plan).numel())
            picture_bytes.append(len(picture) if isinstance(picture, bytes) else picture.numel())
    mean_bytes = sum(pixel_bytes) / max(1, len(pixel_bytes) - 1)
    return int(count * mean_bytes), 1 if np.median(picture_bytes) < LIGHT_BYTES else cores()
