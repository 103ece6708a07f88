"""--batch_size_schedule: another global batch from an epoch on, and still a pure function of the config."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs.arguments import make_config
from configs.errors import ConfigError
from data.batch_sizes import BatchSizes
from data.order import Shuffled, TrainOrder
from tests.conftest import lines_of, run_script
from tests.test_scale import ANY_CUT, check_alike, train
from tests.tiny import tiny_batches, tiny_trainer
from trainer.windows import EpochLengths

SCHEDULE = "--batch_size_schedule 1:64 3:96 --max_steps 95 --lr_scale linear --save_every_steps 10".split()
ENDS = [44, 66, 88, 95]  # of the epochs: 1,438 samples by 32, 64, 64 and, cut short, 96


def test_each_epoch_has_the_size_of_its_milestone():
    sizes = BatchSizes.of(make_config(batch_size=32, batch_size_schedule=("2:64", "5:16")))
    assert [sizes.at(epoch) for epoch in range(7)] == [32, 32, 64, 64, 64, 16, 16]
    assert sizes.all() == [32, 64, 16]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_gives_the_same_samples_in_larger_batches(processes):
    ids = np.arange(100)
    sizes = BatchSizes(10, ((1, 20),))
    for epoch, size, steps in [(0, 10, 10), (1, 20, 5), (2, 20, 5)]:
        plain = TrainOrder(Shuffled(ids, 0), seed=0, batch_size=10, micro_batch_size=10)
        plain.move_to(epoch, 0)
        wanted = np.concatenate([draw.ids for draw in plain]).reshape(steps, size)
        found = []
        for process in range(processes):
            share = {"process": process, "processes": processes}
            order = TrainOrder(Shuffled(ids, 0), seed=0, batch_size=sizes, micro_batch_size=4, **share)
            order.move_to(epoch, 0)
            assert order.steps_per_epoch == order.steps_of(epoch) == steps
            found.append(np.concatenate([draw.ids for draw in order]).reshape(steps, size // processes))
        assert np.array_equal(np.concatenate(found, 1), wanted)


def test_micro_batches_and_the_length_of_a_run_follow_the_batch():
    order = TrainOrder(Shuffled(np.arange(100), 0), seed=0, batch_size=BatchSizes(10, ((1, 20),)), micro_batch_size=64)
    for epoch, size in [(0, 10), (1, 20), (0, 10)]:
        order.move_to(epoch, 0)
        assert {len(draw.ids) for draw in order} == {size}
    assert EpochLengths(order, order.batch_sizes, 1, None).total(3) == 10 + 5 + 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("batch_sizes")


@pytest.fixture(scope="module")
def whole(folder):
    return train(folder, "whole", *ANY_CUT, "--dtype", "float64", *SCHEDULE)


def test_batches_and_learning_rate_follow_the_schedule(whole):
    steps = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [len(step["ids"]) for step in steps] == [32] * 44 + [64] * 44 + [96] * 7
    assert [line["step"] for line in lines_of(whole, "val")] == ENDS
    rates = {line["step"]: line["lr"] for line in lines_of(whole, "train")}
    cosine = {step: (1 + np.cos(np.pi * (step - 1 - 5) / (95 - 5))) / 2 for step in rates if step > 6}
    assert {step: rates[step] / (0.05 * cosine[step]) for step in (20, 50, 90)} == pytest.approx(
        {20: 32 / 256, 50: 64 / 256, 90: 96 / 256}
    )


@pytest.mark.long
@pytest.mark.parametrize("course", [[(50, 2), (0, 1)], [(20, 1), (24, 2), (16, 1), (30, 4), (0, 1)]])
def test_a_run_with_a_schedule_goes_on_anywhere_with_other_processes(folder, whole, course):
    """Stopped within an epoch of each size, and at the end of one."""
    for steps, processes in course:
        stop = ["--stop_after_steps", str(steps)] if steps else []
        flags = [*ANY_CUT, "--dtype", "float64", *SCHEDULE, *stop]
        run = train(folder, f"parts_{len(course)}", *flags, processes=processes)
    check_alike(whole, run, 1e-9)


def test_a_step_of_a_later_epoch_is_computed_again(whole):
    said = run_script("replay.py", whole, "--step", "60").stdout
    assert "step      60 (epoch 2)" in said
    assert "samples.jsonl: equal to the last bit" in said
    assert "mean of steps 51 to 60: equal to the last bit" in said


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (("30",), "has '30'"),
        (("1:64", "1:96"), "epochs must rise"),
        (("0:64",), "epochs must rise from 1 on"),
        (("2:0",), "has '2:0'"),
        (("2:-4",), "has '2:-4'"),
        (("x:64",), "has 'x:64'"),
    ],
)
def test_a_schedule_that_is_none_is_refused(schedule, words):
    with pytest.raises(ConfigError, match=words):
        make_config(batch_size_schedule=schedule)


def test_batches_that_somebody_else_formed_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--batch_size_schedule needs a loader that forms the batches itself"):
        tiny_trainer(tmp_path, tiny_batches([4] * 3), batch_size=4, batch_size_schedule=("1:8",))
