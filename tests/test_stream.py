"""Streams: the same samples and pixels whatever the processes, workers and the place where one begins."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data.retry
from configs.arguments import make_config
from configs.errors import ConfigError, DataError
from data.dataset import load_data
from data.embedded import load_digits
from data.labels import ClassLabels
from data.loader import eval_loader, train_loader
from data.retry import patiently
from data.sequential import Part, SequentialEvalOrder, SequentialStream, SequentialTrainOrder
from data.stream import JoinedReader, SourceReader, Stream
from tests.conftest import ROOT, SHARED_DATA, lines_of, run_script
from tests.hub_server import HubServer

Batch = dict[str, torch.Tensor]


def read(loader, epoch: int = 0, step: int = 0) -> Batch:
    """All of an epoch from a step on."""
    loader.set_position(epoch, step)
    return joined([{name: value.clone() for name, value in batch.items()} for batch in loader])


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("ids", "labels", "images_BCHW")}


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory) -> Path:
    """90 pictures in 3 files of uneven size and row groups of 8: the grey value of row i is i, its label i % 3."""
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for number, (begin, end) in enumerate(((0, 50), (50, 60), (60, 90))):
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(begin, end)]}
        table = datasets.Dataset.from_dict(rows | {"label": [i % 3 for i in range(begin, end)]}, features=features)
        table.to_parquet(folder / f"train-{number:05d}-of-00003.parquet", batch_size=8)
    return folder


def stream_config(**options):
    return make_config(**({"streaming": True, "batch_size": 16, "num_workers": 0, "shuffle_buffer": 32} | options))


@pytest.mark.parametrize("image_size", [8, 33, 100])
def test_the_streamed_digits_have_the_pixels_of_those_in_memory(image_size):
    config = stream_config(image_size=image_size)
    streamed, digits = load_data(config), load_digits()
    batch = read(train_loader(config, streamed))
    assert sorted(batch["ids"].tolist()) == sorted(set(batch["ids"].tolist()))
    assert torch.equal(batch["labels"], torch.from_numpy(digits.labels)[batch["ids"]])
    whole = make_config(batch_size=16, num_workers=0, split=(1.0, 0.0, 0.0), image_size=image_size)
    memory = read(train_loader(whole, load_data(whole)))
    place = {int(number): slot for slot, number in enumerate(memory["ids"])}
    both = [(slot, place[int(number)]) for slot, number in enumerate(batch["ids"]) if int(number) in place]
    ours, theirs = zip(*both)
    assert len(both) > 1000
    assert torch.equal(batch["images_BCHW"][list(ours)], memory["images_BCHW"][list(theirs)])


def test_validation_is_cut_out_of_a_stream_by_split_seed_alone():
    parts = [
        load_data(stream_config(seed=seed, split_seed=split), test=True) for seed, split in ((0, 0), (9, 0), (0, 1))
    ]
    ids = [[split.ids.tolist() for split in (data.train, data.val, data.test)] for data in parts]
    assert ids[0] == ids[1] != ids[2]
    assert sorted(sum(ids[0], [])) == list(range(1797))
    assert 1797 * 0.07 < len(ids[0][1]) < 1797 * 0.13


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 7), st.integers(0, 2), st.integers(8, 100), st.data()
)
def test_streamed_batches_do_not_depend_on_processes_micro_batches_or_where_one_begins(
    parquet_folder, processes: int, share: int, micro: int, epoch: int, buffer: int, data: st.DataObject
):
    options = {
        "dataset": str(parquet_folder),
        "batch_size": 4 * share,
        "shuffle_buffer": buffer,
        "split": (0.8, 0.2, 0),
    }
    whole_config = stream_config(**options)
    opened = load_data(whole_config)
    whole = read(train_loader(whole_config, opened), epoch)
    steps = len(whole["ids"]) // (4 * share)
    assert steps == len(opened.train) // (4 * share)
    assert len(set(whole["ids"].tolist())) == len(whole["ids"])
    first = data.draw(st.integers(0, steps - 1))
    config = stream_config(**options, micro_batch_size=micro)
    ranks = [read(train_loader(config, load_data(config), rank, processes), epoch, first) for rank in range(processes)]
    for name, values in whole.items():
        of_ranks = [rank[name].unflatten(0, (steps - first, -1)) for rank in ranks]
        assert torch.equal(torch.cat(of_ranks, 1).flatten(0, 1), values[first * 4 * share :]), name


@pytest.mark.parametrize("workers", [2, 4])
def test_streamed_pixels_do_not_depend_on_workers(parquet_folder, workers):
    options = {"dataset": str(parquet_folder), "image_size": 8, "augment": "trivialaugment"}
    plain, parallel = (stream_config(num_workers=number, **options) for number in (0, workers))
    loader = train_loader(parallel, load_data(parallel))
    for epoch, step in ((1, 2), (0, 0)):
        assert equal(read(train_loader(plain, load_data(plain)), epoch, step), read(loader, epoch, step))


def test_resuming_reads_no_block_that_is_skipped(parquet_folder, monkeypatch):
    config = stream_config(dataset=str(parquet_folder), split=(1.0, 0.0, 0.0))
    opened = load_data(config)
    loader = train_loader(config, opened)
    stream = opened.train.source
    stream.blocks.clear()
    blocks: list[int] = []
    plain = stream.reader.read
    monkeypatch.setattr(stream.reader, "read", lambda block: (blocks.append(block), plain(block))[1])
    loader.set_position(3, 4)
    list(loader)
    assert len(blocks) == len(set(blocks)) < stream.reader.block_count
    assert {int(block) for block in stream.blocks_of(read(loader, 3, 4)["ids"].numpy())} <= set(blocks)


def test_evaluation_of_a_stream_sees_every_row_once_on_any_number_of_processes(parquet_folder):
    config = stream_config(dataset=str(parquet_folder), micro_batch_size=7, split=(0.5, 0.5, 0.0))
    split = load_data(config).val
    for processes in (1, 2, 3, 4):
        ranks = [list(eval_loader(config, split, 8, rank, processes)) for rank in range(processes)]
        assert len({len(batches) for batches in ranks}) == 1
        ids = [i for batches in ranks for batch in batches if "valid" not in batch for i in batch["ids"].tolist()]
        assert sorted(ids) == split.ids.tolist()


def test_memory_holds_few_blocks(parquet_folder):
    config = stream_config(dataset=str(parquet_folder), shuffle_buffer=8, split=(1.0, 0.0, 0.0))
    opened = load_data(config)
    loader = train_loader(config, opened)
    stream = opened.train.source
    assert (stream.reader.block_count, stream.open_blocks) == (13, 4)
    for epoch in range(2):
        loader.set_position(epoch, 0)
        for _ in loader:
            assert len(stream.blocks) <= 2 * stream.open_blocks


def test_a_stream_of_one_block_is_shuffled_as_a_whole(tmp_path):
    reader = SourceReader(load_digits(), rows_per_block=10_000)
    assert (reader.block_count, Stream(reader, 1).channels) == (1, 1)
    if not (SHARED_DATA / "bccd").is_dir():
        pytest.skip(f"no {SHARED_DATA / 'bccd'}")
    config = stream_config(dataset=str(SHARED_DATA / "bccd"), label_column="image_id", image_size=32, epochs=1)
    opened = load_data(config)
    batches = [read(train_loader(config, opened), epoch) for epoch in (0, 1)]
    assert len(set(batches[0]["ids"].tolist())) == 192
    assert batches[0]["ids"].tolist() != batches[1]["ids"].tolist()
    assert abs(np.corrcoef(np.arange(192), batches[0]["ids"])[0, 1]) < 0.3


# ---- streams that do not tell their length ----------------------------------------------------------------


@pytest.fixture(scope="module")
def tar_files(tmp_path_factory) -> list[str]:
    """60 pictures in three webdataset files of 10, 20 and 30; the grey value of row i is i, its label i % 3."""
    folder = tmp_path_factory.mktemp("tars")
    number = 0
    for file, rows in enumerate((10, 20, 30)):
        with tarfile.open(folder / f"{file}.tar", "w") as tar:
            for _ in range(rows):
                for suffix, content in (("png", png(number)), ("cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                number += 1
    return [str(folder / f"{file}.tar") for file in range(3)]


def sequential(tar_files: list[str]) -> SequentialStream:
    table = datasets.load_dataset("webdataset", data_files=tar_files, streaming=True)["train"]
    return SequentialStream(table, "png", ClassLabels(["0", "1", "2"], ("cls",)), "tars", remote=False)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2), st.integers(5, 80), st.data()
)
def test_batches_of_an_uncounted_stream_do_not_depend_on_processes_or_where_one_begins(
    tar_files, processes: int, share: int, micro: int, epoch: int, chunk: int, data: st.DataObject
):
    stream, part = sequential(tar_files), Part(0, (0.8, 0.2), 0)

    def drawn(process: int, processes: int, first: int = 0) -> list[list[tuple[int, int, int, bytes]]]:
        order = SequentialTrainOrder(
            stream,
            part,
            seed=5,
            batch_size=4 * share,
            micro_batch_size=micro,
            chunk_rows=chunk,
            max_steps=99,
            process=process,
            processes=processes,
        )
        order.epoch, order.first_step = epoch, first
        rows = [
            row
            for draw in order
            for row in zip(draw.ids.tolist(), draw.keys.tolist(), draw.rows.labels.tolist(), draw.rows.pictures)
        ]
        size = 4 * share // processes
        return [rows[place : place + size] for place in range(0, len(rows), size)]

    whole = drawn(0, 1)
    first = data.draw(st.integers(0, len(whole)))
    assert [sum(parts, []) for parts in zip(*(drawn(rank, processes, first) for rank in range(processes)))] == whole[
        first:
    ]
    rows = sum(whole, [])
    assert len({row[0] for row in rows}) == len(rows) > 30
    evaluated = [
        number
        for rank in range(processes)
        for draw in SequentialEvalOrder(
            stream, Part(1, (0.8, 0.2), 0), micro_batch_size=micro, chunk_rows=chunk, process=rank, processes=processes
        )
        if draw.counts
        for number in draw.ids.tolist()
    ]
    assert len(set(evaluated)) == len(evaluated)
    assert not set(evaluated) & {row[0] for row in rows}
    assert len(rows) + len(evaluated) > 60 - 4 * share


def test_an_uncounted_stream_is_read_with_its_labels_and_needs_max_steps(tar_files):
    config = stream_config(
        data_files=tuple(tar_files), max_steps=3, num_classes=3, split=(0.8, 0.2, 0.0), augment="none"
    )
    opened = load_data(config)
    batch = read(train_loader(config, opened))
    assert (batch["images_BCHW"][:, 0, 0, 0] % 3 == batch["labels"]).all()
    assert len(batch["ids"]) == 32
    with pytest.raises(DataError, match="does not tell how many samples"):
        load_data(stream_config(data_files=tuple(tar_files), num_classes=3))
    with pytest.raises(DataError, match="--num_classes"):
        load_data(stream_config(data_files=tuple(tar_files), max_steps=3))


@pytest.mark.parametrize("flag", [{"cache": "ram"}, {"sampling": "balanced"}, {"augment_rare": "randaugment"}])
def test_what_needs_all_data_is_refused_for_streams(flag):
    with pytest.raises(ConfigError, match=f"--{next(iter(flag))} .* --streaming"):
        stream_config(**flag)


# ---- networks ------------------------------------------------------------------------------------------------


class Faulty(SimpleHTTPRequestHandler):
    """Serves a folder with ranges; answers the requests whose numbers are in `faults` with that fault."""

    faults: dict[int, str] = {}  # noqa: RUF012  # set anew by each test
    requests = 0

    def do_GET(self):
        Faulty.requests += 1
        fault = Faulty.faults.get(Faulty.requests) or Faulty.faults.get(0)
        content = (Path(self.directory) / self.path.strip("/")).read_bytes()
        begin, end = 0, len(content) - 1
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            begin, end = int(first), min(int(last or end), end)
        if fault and fault.isdigit():
            self.send_error(int(fault))
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end + 1 - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {begin}-{end}/{len(content)}")
        self.end_headers()
        body = content[begin : end + 1]
        self.wfile.write(body[: len(body) // 2] if fault == "short" else body)

    def do_HEAD(self):
        size = (Path(self.directory) / self.path.strip("/")).stat().st_size
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(parquet_folder):
    Faulty.faults, Faulty.requests = {}, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Faulty, directory=str(parquet_folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield tuple(f"http://127.0.0.1:{http.server_port}/{file.name}" for file in sorted(parquet_folder.iterdir()))
        http.shutdown()


def test_short_faults_of_a_network_are_ridden_out(parquet_folder, server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(data.retry.time, "sleep", waits.append)
    options = {"split": (0.8, 0.2, 0.0), "image_size": 8}
    local = stream_config(dataset=str(parquet_folder), **options)
    remote = stream_config(data_files=server, **options)
    opened = load_data(remote)
    began = Faulty.requests
    Faulty.faults = {began + 2: "503", began + 4: "short", began + 5: "429", began + 9: "500"}
    assert equal(read(train_loader(remote, opened)), read(train_loader(local, load_data(local))))
    assert len(waits) >= 4
    assert max(waits) <= 4


def test_a_lasting_fault_of_a_network_stops_with_one_message(server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(data.retry.time, "sleep", waits.append)
    config = stream_config(data_files=server, split=(0.8, 0.2, 0.0), image_size=8)
    opened = load_data(config)
    Faulty.faults = {0: "503"}
    with pytest.raises(DataError, match=r"cannot read the data: 503.*tried 6 times in 31 s") as error:
        read(train_loader(config, opened))
    assert server[0].rsplit("/", 1)[0] in str(error.value)
    assert "continues the run" in str(error.value)


def test_the_end_of_an_epoch_is_not_slept_through(parquet_folder, monkeypatch):
    """datasets 5 sleeps for 5 s after each shuffled stream."""
    slept: list[float] = []
    here = threading.current_thread()
    monkeypatch.setattr(time, "sleep", lambda s: slept.append(s) if threading.current_thread() is here else None)
    config = stream_config(dataset=str(parquet_folder), split=(0.8, 0.2, 0.0))
    loader = train_loader(config, load_data(config))
    for epoch in range(3):
        read(loader, epoch)
    assert sum(slept) < 1


def test_memory_stays_flat_over_ten_epochs(parquet_folder):
    code = f"""
import resource
from configs.arguments import make_config
from data.dataset import load_data
from data.loader import train_loader

config = make_config(dataset={str(parquet_folder)!r}, streaming=True, batch_size=16, num_workers=0, split=(0.8, 0.2, 0))
loader = train_loader(config, load_data(config))
peaks = []
for epoch in range(10):
    loader.set_position(epoch, 0)
    assert sum(len(batch["ids"]) for batch in loader) >= 64
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(peaks[1], peaks[-1])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    second, last = map(int, done.stdout.split())
    assert last - second < 50, "MB"


def test_a_dataset_of_the_hub_is_streamed_by_ranges(parquet_folder, tmp_path):
    """A local stand-in for the hub, the real client, a fresh process."""
    with HubServer() as hub:
        files = {file.name: file.read_bytes() for file in sorted(parquet_folder.iterdir())}
        hub.repositories["datasets/tester/greys"] = files
        flags = [
            "--streaming",
            "--max_steps",
            "6",
            "--batch_size",
            "8",
            "--trace_samples",
            "--split",
            "0.8",
            "0.2",
            "0",
        ]
        flags += ["--output_dir", str(tmp_path), "--experiment_name"]
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        run_script("train.py", "--dataset", "tester/greys", *flags, "hub", env=env)
    run_script("train.py", "--dataset", parquet_folder, *flags, "local")
    for file in ("samples.jsonl", "best/model.safetensors"):
        assert (tmp_path / "hub" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()
    assert lines_of(tmp_path / "hub") == lines_of(tmp_path / "local")


def test_a_connection_that_is_refused_is_waited_for(monkeypatch):
    """fsspec reports it as a file that is not there."""
    waits: list[float] = []
    monkeypatch.setattr(data.retry.time, "sleep", waits.append)
    url = "http://127.0.0.1:9/x.parquet"

    def reading():
        fault = aiohttp.ClientConnectorError(SimpleNamespace(host="127.0.0.1", port=9, ssl=True), OSError("refused"))
        raise FileNotFoundError(url) from fault

    with pytest.raises(DataError, match=r"Cannot connect.*tried 6 times in 31 s"):
        patiently(reading, url, remote=True)
    assert waits == [1, 2, 4, 8, 16]


def test_one_batch_may_need_more_blocks_than_are_kept(parquet_folder):
    digits = load_digits()
    stream = Stream(SourceReader(digits, rows_per_block=1), open_blocks=1)
    ids = np.array([5, 900, 17, 1500, 5, 3])
    for _ in range(2):
        stream.fetch_ahead([5])
        assert stream.rows(ids).labels.tolist() == digits.labels[ids].tolist()


def test_a_split_without_the_column_is_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    cells = [{"bytes": png(number), "path": None} for number in range(8)]
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1] * 4}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    table.remove_columns("label").to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(DataError, match="the val split has no column 'label'") as error:
        load_data(stream_config(dataset=str(tmp_path)))
    assert "validation.parquet" in str(error.value)


def test_an_uncounted_stream_too_short_for_a_batch_is_refused(tar_files):
    config = stream_config(
        data_files=tuple(tar_files), max_steps=3, num_classes=3, batch_size=64, split=(1.0, 0.0, 0.0)
    )
    with pytest.raises(DataError, match="60 training samples do not fill one global batch of 64"):
        list(train_loader(config, load_data(config)))


def test_a_run_on_an_uncounted_stream_validates_and_is_tested(tar_files, tmp_path):
    flags = ["--streaming", "--num_classes", "3", "--max_steps", "3", "--batch_size", "8", "--data_files", *tar_files]
    said = run_script("train.py", *flags, "--output_dir", tmp_path, "--experiment_name", "x").stdout
    assert "train ? · validation ?" in " ".join(said.split())  # wherever the line is broken
    assert [line["step"] for line in lines_of(tmp_path / "x", "val")] == [3]
    assert "test accuracy" in run_script("test.py", "--weights", tmp_path / "x").stdout


# ---- whole runs, in fresh processes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sessions",  # (processes, workers, the step each ends at)
    [
        [(1, 2, 20), (2, 1, 60)],
        pytest.param([(1, 4, 10), (4, 0, 25), (2, 2, 40), (4, 1, 50), (1, 0, 60)], marks=pytest.mark.long),
    ],
)
def test_a_streamed_run_resumes_exactly_on_other_processes_and_workers(tmp_path, sessions):
    """Sample ids of every step and the losses; at one micro-batch size pixels and weights follow."""
    flags = (
        "--streaming --max_steps 60 --batch_size 32 --micro_batch_size 8 --shuffle_buffer 300 --log_every 1 "
        "--augment trivialaugment --cpu_threads 1 --trace_samples"
    ).split()
    common = [*flags, "--output_dir", tmp_path, "--experiment_name"]
    run_script("train.py", *common, "one", "--num_workers", "0")
    done = 0
    for processes, workers, end in sessions:
        more = ["parts", "--num_workers", str(workers), "--stop_after_steps", str(end - done)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*torchrun, "scripts/train.py", *map(str, common), *more]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True)
        assert json.loads((tmp_path / "parts" / "env.json").read_text())["processes"] == processes
        assert json.loads((tmp_path / "parts" / "status.json").read_text())["step"] == end
        done = end
    assert (tmp_path / "one" / "samples.jsonl").read_text() == (tmp_path / "parts" / "samples.jsonl").read_text()
    one, parts = (lines_of(tmp_path / name, "train") for name in ("one", "parts"))
    first = sessions[0][2]
    assert [line["loss"] for line in one[:first]] == [line["loss"] for line in parts[:first]]
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in one], rel=1e-3)


def test_a_streamed_row_is_named_by_its_file_and_place(parquet_folder):
    reader = load_data(stream_config(dataset=str(parquet_folder))).train.source.reader
    for place, name in (
        (9, "00000-of-00003.parquet, row 9"),
        (50, "00001-of-00003.parquet, row 0"),
        (89, "00002-of-00003.parquet, row 29"),
    ):
        assert reader.name(place).endswith(name)
        assert JoinedReader([reader, reader]).name(90 + place) == reader.name(place)


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_over_a_stream_reads_every_block_once(training, monkeypatch):
    config = stream_config(shuffle_buffer=64, split=(0.5, 0.5, 0.0))
    opened = load_data(config)
    loader = train_loader(config, opened) if training else eval_loader(config, opened.val, 8)
    stream, blocks = opened.train.source, []
    stream.blocks.clear()
    plain = stream.reader.read
    monkeypatch.setattr(stream.reader, "read", lambda block: (blocks.append(block), plain(block))[1])
    list(loader)
    assert sorted(blocks) == list(range(stream.reader.block_count))


def test_a_streamed_row_without_a_picture_is_a_bad_sample(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [{"bytes": png(number), "path": None} if number != 3 else None for number in range(16)]
    table = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 8}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    config = stream_config(dataset=str(tmp_path), split=(1.0, 0.0, 0.0))
    loader = train_loader(config, load_data(config))
    assert sorted(set(read(loader)["ids"].tolist())) == [number for number in range(16) if number != 3]
    assert [one.id for one in loader.bad] == [3]


def test_an_uncounted_stream_is_shuffled_by_seed_and_epoch(tar_files):
    stream = sequential(tar_files)
    files = [
        [row.id for row in stream.rows(epoch, seed)] for seed, epoch in ((0, None), (0, 0), (0, 1), (0, 2), (1, 0))
    ]
    assert len(set(map(tuple, files))) > 2
    orders = [
        [row.id for chunk in stream.chunks(epoch, seed, None, 60) for row in chunk]  # one chunk: its order is all
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(map(tuple, orders))) == 3
    for order in orders:
        assert sorted(order) == sorted(files[0])
        assert abs(np.corrcoef(np.argsort(np.argsort(order)), np.arange(60))[0, 1]) < 0.4


def test_a_spare_of_an_uncounted_stream_is_the_next_row_of_its_chunk_under_the_key_of_the_slot(tar_files):
    stream = sequential(tar_files)
    order = SequentialTrainOrder(stream, None, seed=0, batch_size=20, micro_batch_size=20, chunk_rows=20, max_steps=9)
    draw, chunk = next(iter(order)), next(stream.chunks(0, 0, None, 20))
    for slot in range(20):
        spare, row = draw.spare(slot, 3), chunk[(slot + 3) % 20]
        assert (spare.ids.tolist(), spare.rows.pictures) == ([row.id], [row.picture])
        assert (spare.keys.tolist(), spare.rows.labels.tolist()) == ([draw.keys[slot]], [row.label])


def test_a_break_in_an_uncounted_stream_loses_no_row_and_gives_none_twice(tar_files, monkeypatch):
    monkeypatch.setattr(data.retry.time, "sleep", lambda seconds: None)
    stream = sequential(tar_files)
    expected, whole = list(stream.rows(None, 0)), stream.dataset
    breaks = {0: [4, 7], 2: [0]}  # rows after which a file breaks off, each time it is opened

    def shard(files: int, file: int):
        rows = iter(whole.shard(files, file))
        if breaks.get(file):
            yield from islice(rows, breaks[file].pop(0))
            raise OSError("connection reset")
        yield from rows

    stream.dataset, stream.remote = SimpleNamespace(shard=shard), True
    assert list(stream.rows(None, 0)) == expected
    assert breaks == {0: [], 2: []}


def test_an_uncounted_stream_from_a_network_is_known_as_remote(tar_files):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Faulty, directory=str(Path(tar_files[0]).parent))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        Faulty.faults = {}
        urls = tuple(f"http://127.0.0.1:{http.server_port}/{Path(file).name}" for file in tar_files)
        options = {"max_steps": 3, "num_classes": 3, "split": (0.8, 0.2, 0.0)}
        remote, local = (
            load_data(stream_config(data_files=files, **options)).train for files in (urls, tuple(tar_files))
        )
        http.shutdown()
    assert remote.source.remote and not local.source.remote


def test_an_uncounted_stream_tells_its_channels_and_is_split_by_split_seed_alone(tar_files):
    options = {"data_files": tuple(tar_files), "max_steps": 3, "num_classes": 3, "split": (0.6, 0.4, 0.0)}
    ids = []
    for seed, split in ((0, 0), (9, 0), (0, 1)):
        opened = load_data(stream_config(seed=seed, split_seed=split, **options))
        assert (opened.train.source.channels, opened.info.channels) == (1, 1)
        ids.append([i for b in eval_loader(stream_config(**options), opened.val, 8) for i in b["ids"].tolist()])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(("remote", "fault"), [(False, OSError("a broken disk")), (True, FileNotFoundError("gone"))])
def test_what_waiting_does_not_mend_is_told_at_once(remote, fault, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(data.retry.time, "sleep", waits.append)

    def reading():
        raise fault

    with pytest.raises(DataError, match=str(fault)):
        patiently(reading, "somewhere", remote=remote)
    assert not waits


def test_joined_readers_give_the_rows_of_each(parquet_folder):
    digits = SourceReader(load_digits(), rows_per_block=64)
    parts = [load_data(stream_config(dataset=str(parquet_folder))).train.source, Stream(digits, 4)]
    joined = Stream(JoinedReader([part.reader for part in parts]), 4)
    places = [(0, 3), (1, 5), (0, 89), (1, 1796), (0, 50)]
    rows = joined.rows(np.array([90 * part + place for part, place in places]))
    assert rows.pictures == [parts[part].read(place) for part, place in places]
    assert rows.labels.tolist() == [int(parts[part].rows(np.array([place])).labels[0]) for part, place in places]
    for part, place in places:
        assert joined.name(90 * part + place) == parts[part].name(place)
