"""The order is a pure function: equal for any processes and micro-batches, nothing lost, nothing twice."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import EvalOrder, TrainOrder, even_parts, mix, mix_ids, permutation
from data.splits import stratified_split
from tests.conftest import ROOT


def test_mix_gives_the_same_keys_on_every_machine():
    assert mix(0) == 0x6E789E6AA1B965F4  # the second number of the published splitmix64 from seed 0
    assert mix(1, 2, 3) == 0x48CF5028B6DF10DB
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


def batches(n: int, share: int, processes: int, micro: int, epoch: int, first_step: int) -> list[list[tuple[int, int]]]:
    """(id, key) of each global batch, put together from what every process draws."""
    batch_size = share * processes
    drawn = []
    for process in range(processes):
        order = TrainOrder(
            np.arange(n) * 3,
            seed=4,
            batch_size=batch_size,
            micro_batch_size=micro,
            process=process,
            processes=processes,
        )
        order.epoch, order.first_step = epoch, first_step
        pairs = [pair for draw in order for pair in zip(draw.ids.tolist(), draw.keys.tolist())]
        drawn.append([pairs[place : place + share] for place in range(0, len(pairs), share)])
    return [sum(parts, []) for parts in zip(*drawn)]


@settings(max_examples=60)
@given(st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.integers(1, 9), st.integers(0, 3), st.data())
def test_global_batches_do_not_depend_on_processes_or_micro_batches(
    share: int, processes: int, micro: int, epoch: int, data: st.DataObject
):
    n = data.draw(st.integers(share * processes, 90))
    whole = batches(n, share * processes, 1, share * processes, epoch, 0)
    assert batches(n, share, processes, micro, epoch, 0) == whole
    resumed_at = data.draw(st.integers(0, len(whole)))
    assert batches(n, share, processes, micro, epoch, resumed_at) == whole[resumed_at:]
    ids = [number for batch in whole for number, _ in batch]
    assert len(ids) == len(set(ids)) == n // (share * processes) * share * processes


def test_a_sample_is_augmented_otherwise_in_another_epoch():
    keys = [dict(pair for batch in batches(30, 10, 1, 10, epoch, 0) for pair in batch) for epoch in (0, 1)]
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
