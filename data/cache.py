"""`--cache`: the pictures of a source, decoded and resized once, as uint8 in a memory-mapped file.

A cache is a folder: `pixels.bin`, `index.npy` (large pictures only) and `cache.json`. It is written under another
name and appears by one rename. Two flocks guard it; the kernel drops them with their process, even a killed one:

- on the `.lock` file beside the folder, while a cache is built or opened: one builds, the others wait, then open;
- a shared one on `cache.json`, while a cache is in use: nobody removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from configs.errors import DataError
from data.cache_writer import Writer, forecast, storage_plan
from data.geometry import SMALL
from data.sources import Source, TensorSource

Where = Literal["ram", "disk"]

FORMAT = 2
DECODERS = ("torch", "torchvision", "pillow")  # their versions define the pixels


def cached(source: Source, image_size: int, *, where: Where, shown: bool = True) -> Source:
    """The same samples, read from a cache, which is built first where there is none. Its pixels are read-only.

    Up to SMALL pixels the result is a CachedSquares, above a CachedPictures; a source in memory is returned as it is.
    All processes of a machine share one cache. One of the same dataset and size whose content has changed, or that
    other decoders made, is removed unless it is in use.

    `disk` is $XDG_CACHE_HOME or ~/.cache. `ram` is /dev/shm (the system's temporary folder where there is none): it
    is removed when the last process that uses it ends. Killed processes leave it, and the next run uses it again.
    shown: whether this process prints. Raises DataError where a cache cannot be written.
    """
    if source.in_memory:
        return source
    root = cache_root(where)
    stem = stem_of(source, image_size)
    folder = root / f"{stem}-{key_of(source, image_size)}"
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(root / f"{stem}.lock", shown):
            store = open_store(folder)
            if store is None:
                build(source, image_size, folder, where, shown)
                store = Store(folder)
            remove_stale(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space("no space is left for the cache", root, where) from None
        raise DataError(
            f"cannot write the cache: {error.strerror or error}",
            where=str(error.filename or root),
            fix="set XDG_CACHE_HOME to a folder that you may write to, or --cache none",
        ) from None
    return CachedSquares(source, store) if image_size <= SMALL else CachedPictures(source, store)


def cache_root(where: Where) -> Path:
    """The folder of all caches of this user."""
    if where == "disk":
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return home / "accelerate-vision-template" / "images"
    shared_memory = Path("/dev/shm")
    parent = shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())
    return parent / f"accelerate-vision-template-{os.getuid()}" / "images"


def key_of(source: Source, image_size: int) -> str:
    """16 hexadecimal digits; equal keys, equal pixels."""
    facts = (FORMAT, source.fingerprint(), image_size, source.channels, *map(version, DECODERS))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def stem_of(source: Source, image_size: int) -> str:
    """Names a dataset at a size, whatever its content: `photos-1f0e3dad-224`."""
    readable = re.sub("[^A-Za-z0-9]+", "-", Path(source.origin).name).strip("-")[-40:]
    return f"{readable}-{hashlib.sha256(f'{source.origin} {source.channels}'.encode()).hexdigest()[:8]}-{image_size}"


class Store:
    """An open cache, in use as long as this object lives. Pickles as its path. Raises ValueError for a damaged one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.in_use = (folder / "cache.json").open("rb")
        fcntl.flock(self.in_use, fcntl.LOCK_SH)
        if not leads_to(folder / "cache.json", self.in_use):
            raise FileNotFoundError(errno.ENOENT, "removed by its last user", str(folder))
        self.facts = json.load(self.in_use)
        for name, size in self.facts["bytes"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{folder / name} does not hold {size} bytes")
        self.faults = {int(place): fault for place, fault in self.facts["bad"].items()}
        self.pixels = mapped(folder / "pixels.bin")
        if self.facts["where"] == "ram":
            weakref.finalize(self, remove_if_last, folder, self.in_use, os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.folder,)

    def check(self, place: int) -> None:
        """Raise what decoding this place raised, if it did."""
        if place in self.faults:
            raise DataError(**self.faults[place])


def mapped(path: Path) -> torch.Tensor:
    """A file as uint8 [bytes], whose pages all processes share."""
    if not path.stat().st_size:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(np.memmap(path, np.uint8, "r"))


class Cached:
    """A source whose pixels are in a store; all else is the source's own."""

    def __init__(self, source: Source, store: Store):
        self.source, self.store = source, store
        self.kind, self.labels, self.channels = source.kind, source.labels, source.channels
        self.origin = source.origin
        self.bad = {place: fault["what"] for place, fault in store.faults.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.store)

    def name(self, place: int) -> str:
        return self.source.name(place)

    def sizes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return self.store.folder.name


class CachedSquares(Cached, TensorSource):
    """Small pictures: images_NCHW is the file itself, black where a picture is bad."""

    in_memory = True

    def __init__(self, source: Source, store: Store):
        super().__init__(source, store)
        size = store.facts["image_size"]
        self.images_NCHW = store.pixels.view(-1, self.channels, size, size)

    def read(self, place: int) -> torch.Tensor:
        self.store.check(place)
        return self.images_NCHW[place]


class CachedPictures(Cached):
    """Large pictures, each as it is but for its shorter side: 8/7 of the image size at most."""

    in_memory = False

    def __init__(self, source: Source, store: Store):
        super().__init__(source, store)
        self.index = np.load(store.folder / "index.npy", mmap_mode="r")  # int64 [N, 3]: offset, height, width

    def read(self, place: int) -> torch.Tensor:
        """uint8 [C, H, W]; channels last in memory: a crop of it resizes in 0.77 of the time of planes."""
        self.store.check(place)
        offset, height, width = self.index[place].tolist()
        pixels = self.store.pixels[offset : offset + height * width * self.channels]
        return pixels.view(height, width, self.channels).permute(2, 0, 1)


def open_store(folder: Path) -> Store | None:
    """The cache in this folder; None where there is none or a damaged one."""
    try:
        return Store(folder)
    except (FileNotFoundError, ValueError):
        return None


def build(source: Source, image_size: int, folder: Path, where: Where, shown: bool) -> None:
    """Write a whole cache, then let it appear. The caller holds the lock."""
    for leftover in siblings(folder, r"\.(partial|removed.*)"):
        shutil.rmtree(leftover, ignore_errors=True)
    remove(folder)  # a damaged one
    plan = storage_plan(image_size)
    needed_bytes, threads = forecast(source, plan)
    check_space(needed_bytes, folder.parent, where)
    if shown:
        print(f"cache: decoding {len(source.labels):,} images into {folder}", flush=True)
    start = time.perf_counter()
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir()
    try:
        writer = Writer(source, plan, partial / "pixels.bin", image_size if image_size <= SMALL else None)
        writer.write_all(threads, shown)
        if image_size > SMALL:
            np.save(partial / "index.npy", writer.index)
        file_bytes = {path.name: path.stat().st_size for path in partial.iterdir()}
        facts = {
            "image_size": image_size,
            "where": where,
            "bytes": file_bytes,
            "bad": {place: writer.bad[place] for place in sorted(writer.bad)},
        }
        (partial / "cache.json").write_text(json.dumps(facts))
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if shown:
        megabytes = sum(file_bytes.values()) / 1e6
        bad = f"; {len(writer.bad):,} images cannot be decoded" if writer.bad else ""
        print(f"cache: {megabytes:,.0f} MB in {time.perf_counter() - start:.1f} s{bad}", flush=True)


def check_space(needed_bytes: int, root: Path, where: Where) -> None:
    free_bytes = shutil.disk_usage(root).free
    memory = Path("/proc/meminfo")
    if where == "ram" and memory.exists():  # /dev/shm may be allowed to grow beyond it
        available = re.search(r"MemAvailable: *(\d+) kB", memory.read_text())
        free_bytes = min(free_bytes, int(available[1]) * 1024) if available else free_bytes
    if needed_bytes > free_bytes:
        raise no_space(f"the cache needs about {needed_bytes:,} bytes, {free_bytes:,} are free", root, where)


def no_space(what: str, root: Path, where: Where) -> DataError:
    other = "--cache disk" if where == "ram" else "XDG_CACHE_HOME on a larger disk"
    return DataError(what, where=str(root), fix=f"make room, or {other}, or a smaller --image_size, or --cache none")


@contextmanager
def locked(path: Path, shown: bool) -> Iterator[None]:
    """Wait until no other process builds here, and keep the others waiting. The file goes with the lock."""
    while True:
        with path.open("a") as file:
            if not exclusive(file):
                if shown:
                    print("cache: waiting for another run that builds it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            if leads_to(path, file):  # else its owner has just removed it, and the next one may lock a new file
                try:
                    yield
                finally:
                    path.unlink()
                return


def leads_to(path: Path, file: IO[Any]) -> bool:
    """Whether the path still is that of the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def exclusive(file: IO[Any]) -> bool:
    """Turn this process's lock into an exclusive one; where another process has a lock, have none and tell."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def siblings(folder: Path, ending: str = "") -> list[Path]:
    """The folders beside it of the same dataset and size, with any key, whose names end so (a pattern)."""
    pattern = re.compile(re.escape(folder.name[:-16]) + "[0-9a-f]{16}" + ending)
    return [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]


def remove_stale(folder: Path) -> None:
    """Remove the caches of the same dataset and size with another key, but for those in use."""
    for other in siblings(folder):
        if other != folder:
            with suppress(FileNotFoundError), (other / "cache.json").open("rb") as file:
                if exclusive(file):
                    remove(other)


def remove_if_last(folder: Path, in_use: IO[bytes], process: int) -> None:
    """Remove a cache that nobody uses any more. A forked process leaves it to the one that opened it."""
    if os.getpid() != process:
        return
    with in_use:
        if leads_to(folder / "cache.json", in_use) and exclusive(in_use):
            remove(folder)


def remove(folder: Path) -> None:
    """By one rename, so that nobody opens half of it."""
    aside = folder.with_name(f"{folder.name}.removed-{time.time_ns()}")
    with suppress(FileNotFoundError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
