"""The order is a pure function: equal for any processes and micro-batches, nothing lost, nothing twice."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import (
    Blocks,
    EvalOrder,
    Mixed,
    Resampled,
    Samples,
    Shuffled,
    TrainOrder,
    even_parts,
    mix,
    mix_ids,
    permutation,
)
from data.splits import stratified_split
from tests.conftest import ROOT


def test_mix_gives_the_same_keys_on_every_machine():
    assert mix(0) == 0x6E789E6AA1B965F4  # the second number of the published splitmix64 from seed 0
    assert mix(1, 2, 3) == mix(3, after=mix(1, 2)) == 0x48CF5028B6DF10DB
    code = "from data.order import mix, permutation; print(mix(1, 2, 3), permutation(5, 6, 9).tolist())"
    said = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{mix(1, 2, 3)} {permutation(5, 6, 9).tolist()}\n"}


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.integers(0, 2**40))
def test_array_keys_equal_scalar_keys(ids: list[int], seed: int):
    assert mix_ids(seed, 7, ids=np.array(ids, np.int64)).tolist() == [mix(seed, 7, number) for number in ids]


@given(st.integers(1, 300), st.integers(0, 9), st.integers(0, 9))
def test_every_epoch_is_another_permutation(size: int, seed: int, epoch: int):
    order = permutation(seed, epoch, size)
    assert sorted(order.tolist()) == list(range(size))
    if size > 20:
        assert order.tolist() != permutation(seed, epoch + 1, size).tolist()
        assert order.tolist() != permutation(seed + 1, epoch, size).tolist()


def shuffled(n: int) -> Samples:
    return Shuffled(np.arange(n) * 3, seed=4)


def in_blocks(n: int) -> Samples:
    return Blocks(np.arange(n) * 3, np.arange(n) // 7, open_blocks=2, seed=4)


def resampled(n: int) -> Samples:
    return Resampled(np.arange(n) * 3, 0.2 + np.arange(n) % 3, np.arange(n) % 2, seed=4)


def mixed(n: int) -> Samples:
    """A stream and a table, the small one passed over several times an epoch."""
    small = max(1, n // 5)
    other = Shuffled(1000 + np.arange(small), seed=4)
    return Mixed([in_blocks(n - small) if n > small else shuffled(1), other], [0.3, 0.7], seed=4)


KINDS = st.sampled_from([shuffled, in_blocks, resampled, mixed])


def batches(
    samples: Samples, share: int, processes: int, micro: int, epoch: int, first_step: int
) -> list[list[tuple[int, int]]]:
    """(id, key) of each global batch, put together from what every process draws."""
    drawn = []
    for process in range(processes):
        order = TrainOrder(
            samples,
            seed=4,
            batch_size=share * processes,
            micro_batch_size=micro,
            process=process,
            processes=processes,
        )
        order.epoch, order.first_step = epoch, first_step
        pairs = [pair for draw in order for pair in zip(draw.ids.tolist(), draw.keys.tolist())]
        drawn.append([pairs[place : place + share] for place in range(0, len(pairs), share)])
    return [sum(parts, []) for parts in zip(*drawn)]


@settings(max_examples=100)
@given(KINDS, st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.integers(1, 9), st.integers(0, 3), st.data())
def test_global_batches_do_not_depend_on_processes_or_micro_batches(
    kind, share: int, processes: int, micro: int, epoch: int, data: st.DataObject
):
    n = data.draw(st.integers(share * processes, 90))
    if kind(n).size < share * processes:
        return
    whole = batches(kind(n), share * processes, 1, share * processes, epoch, 0)
    assert batches(kind(n), share, processes, micro, epoch, 0) == whole
    resumed_at = data.draw(st.integers(0, len(whole)))
    assert batches(kind(n), share, processes, micro, epoch, resumed_at) == whole[resumed_at:]
    assert len(whole) == kind(n).size // (share * processes)
    drawn = [pair for batch in whole for pair in batch]
    assert len(set(drawn)) == len(drawn), "one sample twice under one key"
    if kind in (shuffled, in_blocks):
        assert len({number for number, _ in drawn}) == len(drawn)


@settings(max_examples=60)
@given(st.integers(1, 120), st.integers(1, 9), st.integers(1, 6), st.integers(0, 3))
def test_a_stream_is_a_permutation_that_needs_few_blocks_at_a_time(n: int, rows: int, open_blocks: int, epoch: int):
    block_of = np.arange(n) // rows
    samples = Blocks(np.arange(n), block_of, open_blocks=open_blocks, seed=1)
    ids, passes = samples.take(epoch, 0, n)
    assert sorted(ids.tolist()) == list(range(n)) and not passes.any()
    chunk_of_block: dict[int, int] = {}
    place = 0
    while place < n:  # every chunk is the whole of its blocks, and they are what is said to be needed
        needed = samples.blocks_from(epoch, place)
        chunk = needed[:open_blocks]
        size = int(np.isin(block_of, chunk).sum())
        assert set(block_of[ids[place : place + size]]) == set(chunk)
        assert not chunk_of_block.keys() & set(chunk)
        chunk_of_block |= dict.fromkeys(chunk, place)
        place += size
        assert samples.blocks_from(epoch, place - 1)[: len(chunk)] == chunk
        assert needed[open_blocks:] == (samples.blocks_from(epoch, place)[:open_blocks] if place < n else [])
    if n > 40:
        assert ids.tolist() != samples.take(epoch + 1, 0, n)[0].tolist()


@settings(max_examples=60)
@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=60), st.integers(0, 3))
def test_resampling_takes_each_sample_as_often_as_its_weight_rounded(weights: list[float], epoch: int):
    total = sum(weights)
    if total < 1:
        return
    samples = Resampled(np.arange(len(weights)), np.array(weights), np.arange(len(weights)) // 9, seed=0)
    assert samples.size == round(total)
    ids, passes = samples.take(epoch, 0, samples.size)
    counts = np.bincount(ids, minlength=len(weights))
    of_classes = np.add.reduceat(counts - np.array(weights) * samples.size / total, range(0, len(weights), 9))
    assert (np.abs(of_classes) < 1 + 1e-6).all()
    assert (np.abs(counts - np.array(weights) * samples.size / total) < 1 + 1e-6).all()
    assert sorted(zip(ids.tolist(), passes.tolist())) == [(i, k) for i, c in enumerate(counts) for k in range(c)]


def test_mixed_datasets_come_by_weight_and_each_at_its_own_pace():
    first, second = Shuffled(np.arange(60), seed=0), Shuffled(100 + np.arange(40), seed=0)
    samples = Mixed([first, second], [0.9, 0.1], seed=0)
    seen = [samples.take(epoch, 0, samples.size) for epoch in range(6)]
    for ids, _ in seen:
        assert (len(ids), int((ids < 100).sum())) == (100, 90)
    ids = np.concatenate([ids for ids, _ in seen])
    few = ids[ids >= 100].tolist()  # 10 an epoch: all 40 come before one of them comes again
    assert len(set(few[:40])) == 40 and few[:20] != few[40:]
    often = ids[ids < 100]
    assert all(len(set(often[start : start + 60])) == 60 for start in range(0, 540, 60))
    assert {int(p) for _, passes in seen for p in passes} == {0, 1}


def test_a_spare_is_the_next_sample_of_the_epoch_under_the_key_of_the_slot():
    whole = TrainOrder(shuffled(10), seed=0, batch_size=10, micro_batch_size=10)
    parts = TrainOrder(shuffled(10), seed=0, batch_size=10, micro_batch_size=2, process=1, processes=2)
    (draw,) = whole
    order = draw.ids.tolist()
    for slot in range(10):
        spare = draw.spare(slot, 2)
        assert (spare.ids.tolist(), spare.keys.tolist()) == ([order[(slot + 2) % 10]], [draw.keys[slot]])
    later = list(parts)[1]
    assert later.spare(1, 2).ids.tolist() == [order[(5 + 2 + 1 + 2) % 10]]


def test_a_sample_is_augmented_otherwise_in_another_epoch():
    keys = [dict(pair for batch in batches(shuffled(30), 10, 1, 10, epoch, 0) for pair in batch) for epoch in (0, 1)]
    assert all(keys[0][number] != keys[1][number] for number in keys[0])


@given(st.integers(1, 60), st.sampled_from([1, 2, 3, 4]), st.integers(1, 9))
def test_evaluation_sees_every_sample_once_with_as_many_batches_on_each_process(n: int, processes: int, micro: int):
    shares = [
        list(EvalOrder(np.arange(n), micro_batch_size=micro, process=rank, processes=processes))
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = [number for share in shares for draw in share if draw.counts for number in draw.ids.tolist()]
    assert sorted(seen) == list(range(n))


@given(st.lists(st.integers(0, 4), min_size=10, max_size=200), st.integers(0, 5))
def test_a_stratified_split_parts_each_class_alike(labels: list[int], seed: int):
    ids = np.arange(len(labels)) * 2
    parts = stratified_split(ids, np.array(labels), (0.7, 0.2, 0.1), seed)
    assert sorted(np.concatenate(parts).tolist()) == ids.tolist()
    for label in set(labels):
        members = labels.count(label)
        for part, share in zip(parts, (0.7, 0.2, 0.1)):
            assert abs(sum(labels[number // 2] == label for number in part.tolist()) - share * members) <= 1


def test_micro_batches_are_of_about_one_size_and_even_for_pairs():
    assert [even_parts(share, 32) for share in (32, 33, 64, 70, 96, 100)] == [32, 18, 32, 24, 32, 26]
    for share in range(2, 300, 2):
        assert even_parts(share, 32) % 2 == 0
        assert share - even_parts(share, 32) * ((share - 1) // even_parts(share, 32)) > 1


def test_a_spare_may_come_from_the_tail_that_fills_no_batch():
    order = shuffled(10).take(0, 0, 10)[0].tolist()
    *_, last = TrainOrder(shuffled(10), seed=0, batch_size=4, micro_batch_size=4)
    assert [int(last.spare(3, attempt).ids[0]) for attempt in (1, 2, 3)] == [order[8], order[9], order[0]]


def test_order_and_augmentation_follow_the_seed():
    ids = np.arange(60)
    for samples in (
        lambda seed: Shuffled(ids, seed),
        lambda seed: Blocks(ids, ids, open_blocks=1, seed=seed),  # the order of blocks alone
        lambda seed: Blocks(ids, ids * 0, open_blocks=1, seed=seed),  # that of rows alone
        lambda seed: Resampled(ids, np.ones(60), ids % 2, seed),
    ):
        one, other = (
            next(iter(TrainOrder(samples(seed), seed=seed, batch_size=60, micro_batch_size=60))) for seed in (0, 1)
        )
        assert one.ids.tolist() != other.ids.tolist()
        assert not set(one.keys.tolist()) & set(other.keys.tolist())


def test_a_mixture_names_the_blocks_that_it_needs_in_every_epoch():
    first = Blocks(np.arange(30), np.arange(30) // 5, open_blocks=1, seed=0)
    second = Blocks(30 + np.arange(20), 6 + np.arange(20) // 5, open_blocks=1, seed=0)
    samples = Mixed([first, second], [0.3, 0.7], seed=0)
    for epoch in range(4):
        ids, _ = samples.take(epoch, 0, samples.size)
        for place, number in enumerate(ids.tolist()):
            needed = samples.blocks_from(epoch, place)
            assert len(needed) <= 4 and number // 5 in needed


def test_resampling_rounds_by_turns_and_mixes_who_comes_together():
    rare = Resampled(np.arange(3), np.array([0.4, 0.4, 1.2]), np.arange(3), seed=0)
    drawn = np.concatenate([rare.take(epoch, 0, 2)[0] for epoch in range(400)])
    assert np.bincount(drawn) / 400 == pytest.approx([0.4, 0.4, 1.2], abs=0.1)
    halves = Resampled(np.arange(4), np.full(4, 0.5), np.zeros(4, np.int64), seed=0)
    assert len({tuple(sorted(halves.take(epoch, 0, 2)[0].tolist())) for epoch in range(60)}) == 6  # pairs of four
