"""The cache of decoded pictures: equal pixels, one builder, nothing half written, nothing left over."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import DataError
from data import cache, cache_writer
from data.cache import CachedPictures, CachedSquares, Where, cache_root, cached
from data.decode import decode
from data.geometry import whole
from data.labels import ClassLabels
from tests.conftest import ROOT


class Pictures:
    """A source of encoded pictures that counts what is read."""

    in_memory = False
    channels = 3

    def __init__(self, files: list[bytes], title: str = "photos", content: str = "1", wait_seconds: float = 0.0):
        self.kind = ClassLabels(["a", "b"])
        self.files, self.title, self.content, self.wait_seconds = files, title, content, wait_seconds
        self.labels = np.arange(len(files)) % 2
        self.reads, self.origin = 0, title

    def read(self, place: int) -> bytes | torch.Tensor:
        self.reads += 1
        time.sleep(self.wait_seconds)
        if not self.files[place]:
            raise DataError("there is no image", where=self.name(place), fix="put one there")
        return self.files[place]

    def name(self, place: int) -> str:
        return f"{self.title}, row {place}"

    def sizes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return self.content


def encoded(height: int, width: int, number: int = 0) -> bytes:
    """A smooth JPEG picture, another one for each number."""
    generator = np.random.default_rng(number)
    small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def squares(count: int = 6, **options: Any) -> Pictures:
    return Pictures([encoded(20, 24, number) for number in range(count)], **options)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_root("disk")


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def fresh_process(source: str, where: str) -> subprocess.Popen[str]:
    """Caches this source and tells the sum of its first picture."""
    code = f"from tests.test_cache import *; print('sum', int(cached({source}, 16, where={where!r}).read(0).sum()))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@contextmanager
def killed_process(source: Pictures, where: Where) -> Iterator[None]:
    """Another process that caches this source, and is killed at the end of the block."""
    child = os.fork()
    if not child:
        try:
            pictures = cached(source, 16, where=where)
            time.sleep(60 if pictures else 0)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def wait_until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def test_small_pictures_equal_those_decoded_directly_and_are_one_tensor():
    source = squares()
    pictures = cached(source, 16, where="disk")
    assert isinstance(pictures, CachedSquares) and pictures.in_memory
    wanted = [decode(file, "", 3, lambda h, w: (whole(h, w), (16, 16))) for file in source.files]
    assert torch.equal(pictures.images_NCHW, torch.stack(wanted))
    assert torch.equal(pictures.read(3), wanted[3])
    assert pictures.labels.tolist() == [0, 1, 0, 1, 0, 1] and pictures.kind.classes == ["a", "b"]


def test_large_pictures_keep_their_aspect_and_are_never_enlarged():
    shapes = {(200, 300): (80, 120), (302, 160): (151, 80), (80, 90): (80, 90), (50, 400): (50, 400)}
    source = Pictures([encoded(*shape, number) for number, shape in enumerate(shapes)])
    pictures = cached(source, 70, where="disk")
    assert isinstance(pictures, CachedPictures) and not pictures.in_memory
    for place, size in enumerate(shapes.values()):
        wanted = decode(source.files[place], "", 3, lambda h, w, size=size: (whole(h, w), size))
        assert pictures.read(place).shape == (3, *size)
        assert torch.equal(pictures.read(place), wanted)


@pytest.mark.parametrize("image_size", [16, 70])
def test_pixels_of_a_source_are_resized_too(image_size: int):
    class Pixels(Pictures):
        def read(self, place: int) -> torch.Tensor:
            return decode(self.files[place], "", 3, None)

    files = [encoded(200, 300, number) for number in range(3)]
    of_pixels = cached(Pixels(files, content="pixels"), image_size, where="disk")
    of_files = cached(Pictures(files), image_size, where="disk")
    for place in range(3):
        assert of_pixels.read(place).shape == of_files.read(place).shape
        assert (of_pixels.read(place).int() - of_files.read(place).int()).abs().max() <= 12  # decoded at another scale


def test_second_use_reads_no_picture():
    source = squares()
    first = cached(source, 16, where="disk")
    reads = source.reads
    second = cached(source, 16, where="disk")
    assert source.reads == reads
    assert torch.equal(first.images_NCHW, second.images_NCHW)


def test_source_in_memory_is_returned_as_it_is():
    source = squares()
    source.in_memory = True
    assert cached(source, 16, where="disk") is source


def test_pictures_of_many_threads_all_arrive(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_writer, "LIGHT_BYTES", 0)
    monkeypatch.setattr(cache_writer, "CHUNK", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    source = Pictures([encoded(80 + number, 200, number) for number in range(40)])
    pictures = cached(source, 70, where="disk")
    for place in range(40):
        size = 80, round(200 * 80 / (80 + place))
        wanted = decode(source.files[place], "", 3, lambda h, w, size=size: (whole(h, w), size))
        assert torch.equal(pictures.read(place), wanted)


@pytest.mark.parametrize("image_size", [16, 70])
def test_bad_pictures_are_remembered_with_their_reason(image_size: int):
    source = squares()
    source.files[1], source.files[5] = b"", source.files[5][:40]
    for _ in range(2):  # built, then opened
        pictures = cached(source, image_size, where="disk")
        assert set(pictures.bad) == {1, 5}
        assert pictures.bad[1] == "there is no image"
        with pytest.raises(DataError) as caught:
            pictures.read(1)
        error = caught.value
        assert (error.what, error.where, error.fix) == ("there is no image", "photos, row 1", "put one there")
        with pytest.raises(DataError, match="decode"):
            pictures.read(5)
        assert pictures.read(4).float().mean() > 0
    if isinstance(pictures, CachedSquares):
        assert not pictures.images_NCHW[[1, 5]].any()


@pytest.mark.parametrize("image_size", [16, 70])
def test_source_of_bad_pictures_alone_makes_a_cache(image_size: int):
    pictures = cached(Pictures([b"", b""]), image_size, where="disk")
    assert set(pictures.bad) == {0, 1}


def test_changed_content_replaces_the_cache_and_other_datasets_and_sizes_stay(caches: Path):
    cached(squares(), 16, where="disk")
    cached(squares(), 20, where="disk")
    cached(squares(title="elsewhere/photos"), 16, where="disk")
    before = folders(caches)
    changed = squares(count=4, content="2")
    assert len(cached(changed, 16, where="disk").images_NCHW) == 4
    after = folders(caches)
    assert len(before) == len(after) == 3
    assert len(set(before) & set(after)) == 2


def test_other_decoders_make_another_cache(caches: Path, monkeypatch: pytest.MonkeyPatch):
    cached(squares(), 16, where="disk")
    before = folders(caches)
    monkeypatch.setattr(cache, "version", lambda package: "999")
    cached(squares(), 16, where="disk")
    assert len(folders(caches)) == 1 and folders(caches) != before


def test_stale_cache_in_use_stays_until_its_user_has_gone(caches: Path):
    old = cached(squares(), 16, where="disk")
    new = squares(content="2")
    cached(new, 16, where="disk")
    assert len(folders(caches)) == 2
    assert torch.equal(pickle.loads(pickle.dumps(old)).images_NCHW, old.images_NCHW)
    del old
    cached(new, 16, where="disk")
    assert len(folders(caches)) == 1


@pytest.mark.parametrize("image_size, name", [(16, "pixels.bin"), (70, "pixels.bin"), (70, "index.npy")])
def test_truncated_cache_is_built_again(caches: Path, image_size: int, name: str):
    source = squares()
    wanted = cached(source, image_size, where="disk").read(5).clone()
    file = caches / folders(caches)[0] / name
    os.truncate(file, file.stat().st_size - 1)
    assert torch.equal(cached(source, image_size, where="disk").read(5), wanted)
    assert len(folders(caches)) == 1


@pytest.mark.parametrize("text", ["", '{"image_size": 16, "wh'])
def test_cut_off_description_is_built_again(caches: Path, text: str):
    source = squares()
    cached(source, 16, where="disk")
    (caches / folders(caches)[0] / "cache.json").write_text(text)
    reads = source.reads
    assert len(cached(source, 16, where="disk").images_NCHW) == 6
    assert source.reads > reads


@pytest.mark.parametrize("image_size", [16, 70])
def test_pickle_holds_the_path_and_no_pixels(image_size: int):
    pictures = cached(Pictures([encoded(200, 300, number) for number in range(8)]), image_size, where="disk")
    pictures.source.files = []
    pickled = pickle.dumps(pictures)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled).read(7), pictures.read(7))


def test_loader_processes_read_the_same_pixels():
    pictures = cached(squares(), 70, where="disk")
    loader = torch.utils.data.DataLoader(
        range(6), batch_size=None, num_workers=2, collate_fn=lambda place: pictures.read(place).clone()
    )
    assert all(torch.equal(image, pictures.read(place)) for place, image in enumerate(loader))


def test_two_processes_at_once_build_one_cache(caches: Path):
    processes = [fresh_process("squares(wait_seconds=0.3)", "disk") for _ in range(2)]
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert sum(text.count("cache: decoding") for text in told) == 1
    total = int(cached(squares(), 16, where="disk").read(0).sum())
    assert all(f"sum {total}\n" in text for text in told)
    assert len(list(caches.iterdir())) == 1  # and no lock


def test_only_one_at_a_time_holds_the_lock(tmp_path: Path):
    inside, most = 0, 0

    def enter(_: int) -> None:
        nonlocal inside, most
        with cache.locked(tmp_path / "lock", shown=False):
            inside += 1
            most = max(most, inside)
            time.sleep(0.002)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(40)))
    assert most == 1
    assert not list(tmp_path.glob("lock"))


def test_killed_builder_leaves_nothing_in_the_way(caches: Path):
    with killed_process(squares(count=200, wait_seconds=0.05), "disk"):
        wait_until(lambda: list(caches.glob("*.partial/pixels.bin")))
    assert len(list(caches.glob("*.partial"))) == 1
    source = squares(count=200)
    pictures = cached(source, 16, where="disk")
    assert source.reads >= 200
    assert all(image.any() for image in pictures.images_NCHW)
    assert not list(caches.glob("*.partial")) and len(folders(caches)) == 1


@pytest.fixture
def in_ram(tmp_path: Path) -> Callable[[], list[Path]]:
    """What lies in memory for squares(title=str(tmp_path)), of which this test alone knows."""
    root, stem = cache_root("ram"), cache.stem_of(squares(title=str(tmp_path)), 16)
    return lambda: list(root.glob(f"{stem}*"))


def test_cache_in_ram_outlives_a_killed_process_and_goes_with_the_last_one(tmp_path: Path, in_ram: Callable[[], Any]):
    with killed_process(squares(title=str(tmp_path)), "ram"):
        wait_until(lambda: [path.suffix for path in in_ram()] == [""])  # built, and the lock released
    assert len(in_ram()) == 1
    told = fresh_process(f"squares(title={str(tmp_path)!r})", "ram").communicate(timeout=120)[0]
    assert "decoding" not in told and "sum" in told
    assert not in_ram()


def test_cache_in_ram_stays_until_its_last_user_has_gone(tmp_path: Path, in_ram: Callable[[], Any]):
    users = [cached(squares(title=str(tmp_path)), 16, where="ram") for _ in range(2)]
    image = users[0].read(0)
    wanted = image.clone()
    users.pop()
    assert len(in_ram()) == 1
    users.pop()
    assert not in_ram()
    assert torch.equal(image, wanted)  # the pages of a removed file stay while they are mapped


def test_user_of_a_damaged_cache_in_ram_leaves_the_new_one(tmp_path: Path, in_ram: Callable[[], Any]):
    old = cached(squares(title=str(tmp_path)), 16, where="ram")
    (in_ram()[0] / "cache.json").write_text("")
    new = cached(squares(title=str(tmp_path)), 16, where="ram")
    del old
    assert len(in_ram()) == 1
    assert len(new.images_NCHW) == 6


def test_forked_process_leaves_the_cache_in_ram_to_its_parent(tmp_path: Path, in_ram: Callable[[], Any]):
    pictures = cached(squares(title=str(tmp_path)), 16, where="ram")
    child = os.fork()
    if not child:
        del pictures
        os._exit(0)
    os.waitpid(child, 0)
    assert len(in_ram()) == 1
    assert len(pickle.loads(pickle.dumps(pictures)).images_NCHW) == 6


def test_too_little_space_is_told_before_anything_is_decoded(caches: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=f"{6 * 3 * 16 * 16:,} bytes, 1,000 are free") as caught:
        cached(squares(), 16, where="disk")
    assert caught.value.where == str(caches) and "--cache none" in caught.value.fix
    assert not folders(caches)


def test_disk_that_fills_up_leaves_nothing(caches: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match="no space"):
        cached(squares(), 16, where="disk")
    assert not folders(caches)


def test_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot write the cache: Not a directory") as caught:
        cached(squares(), 16, where="disk")
    assert "XDG_CACHE_HOME" in caught.value.fix


def test_torch_threads_are_as_before():
    torch.set_num_threads(2)
    cached(squares(), 16, where="disk")
    assert torch.get_num_threads() == 2
