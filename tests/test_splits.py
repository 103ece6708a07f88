"""Splits keep groups whole and come out the same everywhere; pictures on both sides of a split are found."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import DataError
from data.labels import ClassLabels
from data.leakage import duplicates_between
from data.order import Use, mix
from data.sources import TensorSource
from data.split import Split
from data.splits import grouped_split, part_of
from data.stream import Stream

SHARES = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (0.7, 0.0, 0.3), (3, 2, 2, 1), (1.0,), (0.98, 0.01, 0.01)])
ROWS = st.lists(st.tuples(st.integers(-3, 12), st.integers(0, 3)), min_size=1, max_size=120)  # (group, label)


def split_rows(rows: list[tuple[int, int]], shares: tuple[float, ...], seed: int = 0) -> list[list[int]]:
    """The rows of each part."""
    groups, labels = np.array(rows).T
    return [part.tolist() for part in grouped_split(np.arange(len(rows)), groups, labels, shares, seed)]


def groups_of_sizes(*sizes: int) -> list[tuple[int, int]]:
    """Rows of one class, in groups of these sizes."""
    return [(group, 0) for group, size in enumerate(sizes) for _ in range(size)]


@given(ROWS, SHARES, st.integers(0, 5))
def test_a_grouped_split_keeps_groups_whole_and_shares_within_the_largest_groups(rows, shares, seed):
    sizes = np.unique([group for group, _ in rows], return_counts=True)[1]
    wanted = sum(share > 0 for share in shares)
    if len(sizes) < wanted:
        with pytest.raises(DataError, match=f"{len(sizes)} groups cannot be cut into {wanted} parts"):
            split_rows(rows, shares, seed)
        return
    parts = split_rows(rows, shares, seed)
    assert sorted(sum(parts, [])) == list(range(len(rows)))
    assert all(part == sorted(part) for part in parts)
    groups = [{rows[row][0] for row in part} for part in parts]
    assert sum(map(len, groups)) == len(sizes)
    for part, share in zip(parts, shares):
        too_many = len(part) - share / sum(shares) * len(rows)
        assert -(wanted - 1) * sizes.max() - 1e-5 < too_many < sizes.max() + 1e-5
        assert bool(part) == (share > 0)


@given(ROWS, st.randoms(use_true_random=False), st.integers(0, 5))
def test_a_grouped_split_does_not_depend_on_the_order_of_rows_or_on_ids(rows, random, seed):
    rows = [*rows, (20, 0), (21, 1)]
    order = list(range(len(rows)))
    random.shuffle(order)
    groups, labels = np.array(rows).T
    names = np.array([f"patient {group}" for group in groups])
    for kind in (groups, names, names.astype(object)):
        straight = grouped_split(np.arange(len(rows)), kind, labels, (0.7, 0.3), seed)
        shuffled = grouped_split(np.array(order) + 1000, kind[order], labels[order], (0.7, 0.3), seed)
        assert [part.tolist() for part in straight] == [(part - 1000).tolist() for part in shuffled]


def test_grouped_splits_are_the_same_on_every_machine_and_differ_between_seeds():
    rows = [(group, group % 3) for group in range(12) for _ in range(2)]
    groups, labels = np.array(rows).T

    def held_out(kind: np.ndarray, seed: int) -> list[int]:
        return grouped_split(groups, kind, labels, (0.75, 0.25), seed)[1].tolist()[::2]

    names = np.array([f"patient {group}" for group in groups])
    assert [held_out(groups, seed) for seed in range(3)] == [[4, 6, 11], [0, 1, 11], [1, 8, 9]]
    assert [held_out(names, seed) for seed in range(3)] == [[5, 7, 9], [4, 6, 11], [2, 4, 6]]


def test_grouped_splits_of_groups_of_many_sizes_differ_between_seeds():
    rows = groups_of_sizes(*range(1, 40))
    splits = [split_rows(rows, (0.8, 0.2), seed) for seed in range(4)]
    assert all(splits[one] != splits[two] for one in range(4) for two in range(one))


@given(st.integers(0, 1000))
def test_groups_of_one_class_each_are_parted_alike_in_every_class(seed):
    rows = [(10 * label + group, label) for label in range(4) for group in range(10) for _ in range(5)]
    parts = split_rows(rows, (0.8, 0.1, 0.1), seed)
    per_class = [np.bincount([rows[row][1] for row in part]).tolist() for part in parts]
    assert per_class == [[40] * 4, [5] * 4, [5] * 4]


@given(st.lists(st.integers(0, 3), min_size=60, max_size=60), st.integers(0, 1000))
def test_groups_of_one_size_are_parted_exactly_whatever_their_classes(labels, seed):
    rows = [(row // 3, label) for row, label in enumerate(labels)]
    for groups in ((16, 2, 2), (2, 4, 14), (12, 6, 2), (1, 1, 3, 15), (4, 3, 2, 9, 2)):
        parts = split_rows(rows, tuple(number / 20 for number in groups), seed)
        assert [len(part) for part in parts] == [3 * number for number in groups]


@given(st.integers(0, 1000))
def test_small_groups_fill_what_large_ones_leave(seed):
    assert [len(part) for part in split_rows(groups_of_sizes(50, *[1] * 50), (0.5, 0.5), seed)] == [50, 50]
    assert [len(part) for part in split_rows(groups_of_sizes(1, 90, 1), (0.8, 0.1, 0.1), seed)] == [90, 1, 1]


def test_a_group_that_is_missing_or_no_name_is_refused():
    ids = np.arange(3)
    for groups, said in (
        (np.array(["a", None, "b"], object), "the group of row 1 is None"),
        (np.array([0.5, 1.5, np.nan]), "the group of row 0 is 0.5"),
    ):
        with pytest.raises(DataError, match=said):
            grouped_split(ids, groups, ids, (0.5, 0.5), 0)


@given(st.lists(st.integers(0, 2**62), max_size=50), SHARES, st.integers(0, 2**40))
def test_a_streamed_sample_has_the_part_that_its_own_number_falls_into(ids, shares, seed):
    parts = part_of(np.array(ids, np.int64), shares, seed)
    assert parts.dtype == np.int64
    for number, part in zip(ids, parts.tolist()):
        uniform = mix(seed, Use.SPLIT, number) / 2**64 * sum(shares)
        edges = [0.0, *np.cumsum(shares).tolist()]
        assert edges[part] - 1e-9 <= uniform <= edges[part + 1] + 1e-9
        assert part_of(np.array([number]), shares, seed).tolist() == [part]


def test_streamed_parts_have_their_shares_on_average_and_differ_between_seeds():
    ids = np.arange(100_000)
    shares = (7, 0, 2, 1)
    parts = part_of(ids, shares, seed=1)
    assert np.allclose(
        np.bincount(parts, minlength=4) / len(ids), (0.7, 0.0, 0.2, 0.1), atol=0.006
    )  # 4 standard deviations
    assert np.bincount(parts)[1] == 0
    same = (parts == part_of(ids, shares, seed=2)).mean()
    assert abs(same - 0.54) < 0.007  # 0.7^2 + 0.2^2 + 0.1^2: as often as by chance


HEADER = b"P5 1 1 255\n"


class Files:
    """A source of encoded pictures, told by what follows their header; None stands for one that cannot be read."""

    classes, channels, in_memory = ["cat", "dog"], 3, False

    def __init__(self, title: str, *files: tuple[bytes | None, int]):
        self.title, self.files = title, [file for file, _ in files]
        self.labels = np.array([label for _, label in files])
        self.reads: list[int] = []
        self.sized = 0

    def read(self, place: int) -> bytes:
        self.reads.append(place)
        content = self.files[place]
        if content is None:
            raise DataError("there is no image")
        return HEADER + content if content else content

    def name(self, place: int) -> str:
        return f"{self.title}/{place}.png"

    def sizes(self) -> np.ndarray:
        self.sized += 1
        return np.array([4 if file is None else len(file) + len(HEADER) * bool(file) for file in self.files], np.int64)

    def fingerprint(self) -> str:
        return self.title


def whole(source) -> Split:
    return Split(source, np.arange(len(source.labels)))


def test_copies_between_two_sources_are_found_and_nothing_else_is():
    train = Files(
        "train", (b"aaaa", 0), (b"bbbb", 1), (b"cc", 0), (b"ee", 1), (b"only here", 0), (b"aaaa", 1), (b"ff", -1)
    )
    val = Files("val", (b"dddd", 0), (b"ee", 1), (b"aaaa", 0), (b"aaa", 0), (b"bbbb", 0), (b"ee", -1), (b"ff", 0))
    found = duplicates_between(whole(train), whole(val))
    assert found.pairs == [(3, 1), (0, 2), (1, 4), (3, 5), (6, 6)]
    assert found.other_label == 1
    assert 4 not in train.reads and 3 not in val.reads  # no picture of the other side is as large
    assert found.warning() == (
        "5 validation images are exact copies of training images (1 with another label): train/3.png = val/1.png, "
        "train/0.png = val/2.png, train/1.png = val/4.png, ...: the validation score is too good; remove them"
    )


def test_only_the_samples_of_the_splits_are_compared_when_both_are_cut_from_one_source():
    source = Files("all", *((content, 0) for content in (b"aaaa", b"bbbb", b"aaaa", b"cccc", b"bbbb", b"cccc")))
    found = duplicates_between(Split(source, np.array([0, 3, 4])), Split(source, np.array([2, 5])))
    assert (found.pairs, source.sized) == ([(0, 2), (3, 5)], 1)
    assert duplicates_between(Split(source, np.array([0, 2])), Split(source, np.array([1, 4]))).pairs == []
    one = duplicates_between(Split(source, np.array([0])), Split(source, np.array([2, 3])))
    assert one.warning("training", "test") == (
        "1 test image is an exact copy of a training image: all/0.png = all/2.png: the test score is too good; "
        "remove them"
    )


def test_three_examples_are_all_there_are():
    files = [(content, 0) for content in (b"a", b"b", b"c")]
    said = duplicates_between(whole(Files("train", *files)), whole(Files("val", *files))).warning()
    assert "train/0.png = val/0.png, train/1.png = val/1.png, train/2.png = val/2.png: the" in said


def test_without_copies_there_is_no_warning():
    found = duplicates_between(whole(Files("train", (b"aaaa", 0))), whole(Files("val", (b"bbbb", 0))))
    assert (found.pairs, found.skipped, found.warning()) == ([], "", "")


@pytest.mark.parametrize("in_memory", [False, True])
def test_unreadable_and_empty_pictures_are_passed_over(in_memory: bool, monkeypatch: pytest.MonkeyPatch):
    train = Files("train", (None, 0), (b"aaaa", 0), (b"", 0))
    val = Files("val", (b"aaaa", 0), (None, 0), (b"", 0))
    if in_memory:
        monkeypatch.setattr(Files, "in_memory", True)
        monkeypatch.setattr(Files, "sizes", lambda self: None)
    assert duplicates_between(whole(train), whole(val)).pairs == [(1, 0)]


def test_equal_broken_files_are_no_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.test_splits.HEADER", b"")
    assert duplicates_between(whole(Files("train", (b"aaaa", 0))), whole(Files("val", (b"aaaa", 0)))).pairs == []


def test_nothing_is_read_beyond_the_limit():
    train = Files("train", (b"aaaa", 0), (b"bbbb", 0), (b"a larger one", 0))
    val = Files("val", (b"aaaa", 0))
    assert duplicates_between(whole(train), whole(val), limit_bytes=12 + 3 * len(HEADER)).pairs == [(0, 0)]
    train.reads.clear()
    found = duplicates_between(whole(train), whole(val), limit_bytes=11 + 3 * len(HEADER))
    assert (found.pairs, train.reads) == ([], [])
    assert "2 and 1 of them are of a size that the others have too" in found.skipped
    assert found.warning().startswith("training and validation images were not searched for common ones: 2 and 1 ")


def test_pictures_of_unknown_size_are_not_read(monkeypatch: pytest.MonkeyPatch):
    train, val = Files("train", (b"aaaa", 0)), Files("val", (b"aaaa", 0))
    monkeypatch.setattr(val, "sizes", lambda: None)
    found = duplicates_between(whole(train), whole(val))
    assert (found.pairs, train.reads, val.reads) == ([], [], [])
    assert "sizes are not known" in found.skipped


def test_streams_are_not_compared():
    reader = SimpleNamespace(size=1, block_count=1, kind=ClassLabels(["cat", "dog"]))
    stream = Split(Stream(reader, open_blocks=1, channels=3), np.arange(1))
    train = Files("train", (b"aaaa", 0))
    for one, two in ((whole(train), stream), (stream, whole(train))):
        assert duplicates_between(one, two).skipped == "they are streamed"
    assert (train.reads, train.sized) == ([], 0)


def test_copies_among_tensors_are_found_by_shape_and_pixels():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 4, 6), generator=generator, dtype=torch.uint8)
    pixels[41], pixels[45] = pixels[7], pixels[3]
    pixels[44] = pixels[8]
    pixels[44, 2, 3, 5] ^= 1
    source = TensorSource(pixels, np.arange(50) % 2, ["cat", "dog"])
    found = duplicates_between(Split(source, np.arange(40)), Split(source, np.arange(40, 50)))
    assert (found.pairs, found.other_label) == ([(7, 41), (3, 45)], 0)
    strided = pixels.to(memory_format=torch.channels_last)
    found = duplicates_between(whole(source), whole(TensorSource(strided, source.labels, source.kind)))
    assert found.pairs == [({41: 7, 45: 3}.get(place, place), place) for place in range(50)]
    turned = TensorSource(pixels.reshape(50, 3, 6, 4), source.labels, source.kind)
    assert duplicates_between(whole(source), whole(turned)).pairs == []
