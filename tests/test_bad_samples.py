"""A bad sample is replaced by a rule, named once, and never moves another sample."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.arguments import make_config
from configs.errors import DataError
from data.dataset import load_data
from data.labels import ClassLabels
from data.loader import eval_loader, train_loader
from data.sources import Source, TensorSource
from data.split import Split
from tests.conftest import ROOT, lines_of, run_script
from tests.tiny import tiny_batches, tiny_trainer
from trainer import base_trainer
from trainer.bad_samples import BadSamples
from trainer.run_folder import RunFolder

SIZE = 12


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


class Pictures:
    """Twelve pictures; the grey value of number i is 10 * i. The bad ones are no pictures."""

    kind, channels, in_memory = ClassLabels(["a", "b"]), 1, False

    def __init__(self, bad: set[int]):
        self.bad, self.labels = bad, np.arange(SIZE) % 2

    def read(self, place: int) -> bytes:
        return b"no picture" if place in self.bad else png(10 * place)

    def name(self, place: int) -> str:
        return f"picture {place}"


def loader(bad: set[int], process: int = 0, processes: int = 1, **options):
    config = make_config(**({"batch_size": 4, "num_workers": 0, "augment": "none"} | options))
    source: Source = Pictures(bad)  # type: ignore[assignment]
    data = replace(load_data(make_config()), train=Split(source, np.arange(SIZE)), kind=ClassLabels(["a", "b"]))
    return train_loader(config, data, process, processes)


def drawn(loader, step: int = 0) -> list[tuple[int, int, int]]:
    """(id, grey value, label) in order."""
    loader.set_position(1, step)
    rows = []
    for batch in loader:
        rows += zip(batch["ids"].tolist(), batch["images_BCHW"][:, 0, 0, 0].tolist(), batch["labels"].tolist())
    return rows


@pytest.mark.parametrize("place", range(SIZE))
def test_a_bad_image_at_any_place_is_replaced_by_the_next_and_moves_no_other(place):
    order = [row[0] for row in drawn(loader(set()))]
    bad = order[place]
    stand_in = order[(place + 1) % SIZE]
    expected = [(i, 10 * i, i % 2) for i in (stand_in if number == bad else number for number in order)]
    ours = loader({bad})
    assert drawn(ours) == expected
    assert [(one.id, one.source) for one in ours.bad] == [(bad, f"picture {bad}")]
    assert "cannot decode" in ours.bad[0].reason
    assert drawn(loader({bad}, micro_batch_size=1)) == expected
    assert drawn(loader({bad}), step=2) == expected[8:]
    ranks = [drawn(loader({bad}, rank, 2)) for rank in range(2)]
    assert [row for step in range(3) for rank in ranks for row in rank[2 * step : 2 * step + 2]] == expected


def test_the_stand_in_is_augmented_under_the_key_of_the_place():
    options = {"augment": "default", "image_size": 8}
    order = [row[0] for row in drawn(loader(set()))]
    ours = loader({order[3]}, **options)
    ours.set_position(1, 0)
    (first, *_) = ours
    plain = loader(set(), **options)
    draw = plain.order.draw(1, 3, 4)
    alone = plain.dataset.__getitems__(draw._replace(ids=np.array([order[4]])))
    assert torch.equal(first["images_BCHW"][3], alone["images_BCHW"][0])


def test_several_bad_in_a_row_are_passed_over_and_workers_change_nothing():
    order = [row[0] for row in drawn(loader(set()))]
    bad = set(order[2:7])
    expected = [order[7] if number in bad else number for number in order]
    ours = loader(bad)
    assert [row[0] for row in drawn(ours)] == expected
    assert {one.id for one in ours.bad} == bad
    parallel = loader(bad, num_workers=2)
    assert [row[0] for row in drawn(parallel)] == expected == [row[0] for row in drawn(parallel)]
    with pytest.raises(DataError, match="21 samples in a row cannot be used, the last: cannot decode"):
        drawn(loader(set(range(SIZE))))


def test_evaluation_leaves_bad_samples_out_and_counts_the_others_once():
    source = Pictures({0, 5, 6, 7, 11})
    split = Split(source, np.arange(SIZE))  # type: ignore[arg-type]
    for processes in (1, 2, 3):
        loaders = [
            eval_loader(make_config(micro_batch_size=2, num_workers=0), split, 8, rank, processes)
            for rank in range(processes)
        ]
        batches = [list(loader) for loader in loaders]
        assert len({len(part) for part in batches}) == 1
        ids = [i for part in batches for batch in part if "valid" not in batch for i in batch["ids"].tolist()]
        assert sorted(ids) == [1, 2, 3, 4, 8, 9, 10]
        assert sorted(one.id for loader in loaders for one in loader.bad) == [0, 5, 6, 7, 11]


@pytest.fixture
def folder(tmp_path):
    """Two classes of 40; two files are broken."""
    generator = np.random.default_rng(0)
    for name, low in (("bright", 150), ("dark", 0)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(low, low + 100, (12, 10), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number:02d}.png")
    (tmp_path / "images" / "dark" / "03.png").write_bytes(b"")
    whole = (tmp_path / "images" / "bright" / "00.png").read_bytes()
    (tmp_path / "images" / "bright" / "00.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "images"


@pytest.mark.parametrize("streaming", [[], pytest.param(["--streaming"], marks=pytest.mark.long)])
def test_a_run_over_bad_files_names_them_once_and_resumes_exactly(tmp_path, folder, streaming):
    flags = (
        "--batch_size 16 --epochs 3 --log_every 1 --save_every_steps 1 --cpu_threads 1 --split 0.8 0.2 0 "
        "--max_bad_fraction 0.1 --trace_samples"
    ).split()
    common = ["--train_data_dir", folder, "--output_dir", tmp_path, *flags, *streaming, "--experiment_name"]
    said = run_script("train.py", *common, "whole", "--num_workers", "0").stdout
    assert "bad       2 samples could not be used" in said
    run_script("train.py", *common, "parts", "--num_workers", "2", "--stop_after_steps", "5", rc=75)
    run_script("train.py", *common, "parts", "--num_workers", "0")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert (whole / "bad_samples.jsonl").read_text() == (parts / "bad_samples.jsonl").read_text()
    assert lines_of(whole) == lines_of(parts)
    assert (whole / "samples.jsonl").read_text() == (parts / "samples.jsonl").read_text()
    bad = [json.loads(line) for line in (whole / "bad_samples.jsonl").read_text().splitlines()]
    broken = [str(folder / "bright" / "00.png"), str(folder / "dark" / "03.png")]
    assert sorted(line["source"] for line in bad) == broken
    assert all(line["reason"] and line["step"] >= 1 for line in bad)
    assert run_script("test.py", "--weights", whole, "--on", "train").stdout.count("left out") <= 2


def test_two_processes_name_the_bad_samples_that_one_does(tmp_path, folder):
    flags = "--batch_size 16 --epochs 2 --log_every 2 --cpu_threads 1 --split 0.8 0.2 0 --max_bad_fraction 0.1".split()
    common = ["--train_data_dir", folder, "--output_dir", tmp_path, *flags, "--trace_samples", "--experiment_name"]
    run_script("train.py", *common, "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "scripts/train.py", *map(str, common), "two"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, check=True)
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2
    for file in ("bad_samples.jsonl", "samples.jsonl"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()


def test_too_many_bad_samples_stop_a_run_with_the_list(tmp_path, folder):
    flags = ["--train_data_dir", folder, "--output_dir", tmp_path, "--experiment_name", "x", "--split", "1", "0", "0"]
    flags += ["--batch_size", "16", "--epochs", "3", "--monitor", "loss"]
    done = run_script("train.py", *flags, rc=1)
    assert "2 of 80 train samples cannot be used, more than --max_bad_fraction 0.01" in done.stderr
    assert "dark/03.png" in done.stderr and "bright/00.png" in done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "x"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    run_script("train.py", *flags, "--max_bad_fraction", "0.03")  # the same run, allowed more
    assert json.loads((run / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (-1, "its label is missing, or none of the 2 training classes"),
        (2, "label 2: the classes are numbered 0 to 1"),
    ],
)
def test_a_sample_whose_label_is_no_class_is_bad(label, reason):
    order = [row[0] for row in drawn(loader(set()))]
    ours = loader(set())
    ours.dataset.source.labels[order[3]] = label
    assert drawn(ours) == [(i, 10 * i, i % 2) for i in (*order[:3], order[4], *order[4:])]
    assert [(one.id, one.reason) for one in ours.bad] == [(order[3], reason)]


def test_an_epoch_that_was_broken_off_changes_nothing_in_the_next():
    order = [row[0] for row in drawn(loader(set()))]
    ours = loader({order[5]}, num_workers=2)  # they are ahead when it is broken off
    ours.set_position(1, 0)
    next(iter(ours))
    assert [row[0] for row in drawn(ours)] == [*order[:5], order[6], *order[6:]]


def line(number: int, step: int = 1) -> dict:
    return {"split": "train", "step": step, "id": number, "source": f"{number}.png", "reason": "broken"}


def met(*ids: int, size: int | None = 100) -> SimpleNamespace:
    """A loader that met these bad samples."""
    return SimpleNamespace(bad=[(number, f"{number}.png", "broken") for number in ids], size=size)


def bad_samples(tmp_path, max_fraction: float, others: tuple[dict, ...] = ()) -> BadSamples:
    return BadSamples(RunFolder(tmp_path), max_fraction, lambda lines: [*lines, *others])


def test_bad_samples_may_reach_the_limit_of_their_own_split(tmp_path):
    bad = bad_samples(tmp_path, 0.02)
    bad.collect("train", met(1, 2), 1)
    bad.collect("val", met(1, size=50), 1)
    bad.share(32)
    bad.collect("train", met(3), 2)
    with pytest.raises(DataError, match="3 of 100 train samples cannot be used"):
        bad.share(64)


def test_the_limit_of_an_uncounted_stream_follows_what_was_seen_from_a_thousand_on(tmp_path):
    bad = bad_samples(tmp_path, 0.01)
    bad.collect("train", met(*range(10), size=None), 1)
    bad.share(32)
    bad.collect("train", met(*range(10, 20), size=None), 1)
    bad.share(2000)
    bad.collect("train", met(20, size=None), 1)
    with pytest.raises(DataError, match="21 of 2,000 train samples"):
        bad.share(2000)


def test_bad_samples_of_all_processes_are_written_once_in_order(tmp_path):
    bad = bad_samples(tmp_path, 1.0, others=(line(9, step=1), line(4, step=1), line(7, step=3)))
    bad.collect("train", met(7, 5, 7), 3)
    for _ in range(2):
        bad.share(0)
    written = [json.loads(text) for text in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert written == [line(4, 1), line(9, 1), line(5, 3), line(7, 3)]


class Reporting:
    """A loader of these batches, which meets bad samples in the batch of this number."""

    def __init__(self, batches: list, number: int, *found: int, size: int | None = 100):
        self.batches, self.number, self.found, self.size = batches, number, found, size
        self.bad: list[tuple[int, str, str]] = []
        self.steps_per_epoch = len(batches)

    def set_position(self, epoch: int, step_in_epoch: int) -> None:
        self.first = step_in_epoch

    def __iter__(self):
        for number in range(self.first, len(self.batches)):
            if number == self.number:
                self.bad += [(place, f"{place}.png", "broken") for place in self.found]
            yield self.batches[number]


def written(folder) -> list[tuple[str, int, int]]:
    lines = [json.loads(text) for text in (folder / "run" / "bad_samples.jsonl").read_text().splitlines()]
    return [(line["split"], line["step"], line["id"]) for line in lines]


def test_bad_samples_between_log_lines_and_of_validation_are_written_with_their_step(tmp_path):
    train = Reporting(tiny_batches([6] * 4), 1, 7)
    val = Reporting(tiny_batches([6]), 0, 7)
    val.set_position(0, 0)
    tiny_trainer(tmp_path, train, val, experiment_name="run", batch_size=6, log_every=100).train()
    assert written(tmp_path) == [("train", 2, 7), ("val", 4, 7)]


def test_a_bad_sample_is_that_of_its_step_though_batches_are_fetched_ahead(tmp_path, monkeypatch):
    """As with CUDA, where one travels to the device while another is computed on."""

    def fetched_ahead(items, device, move):
        moved = map(move, items)
        waiting = next(moved)
        for batch in moved:
            yield waiting
            waiting = batch
        yield waiting

    monkeypatch.setattr(base_trainer, "moved_ahead", fetched_ahead)
    train = Reporting(tiny_batches([6] * 4), 2, 7)
    tiny_trainer(tmp_path, train, experiment_name="run", batch_size=6, log_every=100, monitor="loss").train()
    assert written(tmp_path) == [("train", 3, 7)]


def test_a_bad_sample_of_a_step_that_is_done_again_is_written_again(tmp_path):
    options = {"experiment_name": "run", "batch_size": 6, "epochs": 2}
    batches = tiny_batches([6] * 4)
    tiny_trainer(tmp_path, batches, stop_after_steps=2, **options).train()
    (tmp_path / "run" / "bad_samples.jsonl").write_text(json.dumps(line(7, step=3)) + "\n")  # then it was killed
    tiny_trainer(tmp_path, Reporting(batches, 2, 7), **options).train()
    assert written(tmp_path) == [("train", 3, 7)]


def test_the_samples_seen_are_those_of_all_steps(tmp_path):
    train = Reporting(tiny_batches([500] * 4), 3, *range(15), size=None)
    tiny_trainer(tmp_path, train, experiment_name="run", batch_size=500, monitor="loss").train()
    assert len(written(tmp_path)) == 15  # of 2000; of the first 1000 they were too many


def test_stand_ins_that_are_bad_are_noted_too_and_the_search_ends_after_twenty():
    order = [row[0] for row in drawn(loader(set()))]
    ours = loader({order[11], order[0]})
    assert [row[0] for row in drawn(ours, step=2)] == [*order[8:11], order[1]]
    assert [one.id for one in ours.bad] == [order[11], order[0]]
    ours = loader(set(range(SIZE)))
    with pytest.raises(DataError, match="21 samples in a row"):
        drawn(ours)
    assert len(ours.bad) == 21


def test_bad_pictures_among_those_in_memory_are_replaced():
    order = [row[0] for row in drawn(loader(set()))]
    ours = loader(set())
    source = ours.dataset.source
    pixels = torch.stack([torch.full((1, 8, 8), 10 * place, dtype=torch.uint8) for place in range(SIZE)])
    ours.dataset.source = TensorSource(pixels, source.labels, ["a", "b"])
    ours.dataset.source.bad = {order[3]: "it was cut off"}
    assert drawn(ours) == [(i, 10 * i, i % 2) for i in (*order[:3], order[4], *order[4:])]
    assert [(one.id, one.reason) for one in ours.bad] == [(order[3], "it was cut off")]
