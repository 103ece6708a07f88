"""Plain lists of batches on several processes, and tasks that count in their own way: the reference is one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.plain_loaders import CASES

REFUSED = {
    "a step less on one process": "process 0 has 1 more batch(es) to compute, process ",
    "compared, fewer on one process": "process 0 has batches of [",
}


def trained(folder: Path, processes: int) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "tests/plain_loaders.py", str(folder)],
        cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{processes}.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, trained(folder, 1)


def metrics(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name != "weights"}


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_processes_that_share_a_batch_compute_what_one_does(alone, processes):
    folder, whole = alone
    shared = trained(folder, processes)
    for name, words in REFUSED.items():
        assert shared[name]["error"].startswith(words)
    assert whole.keys() == shared.keys() == {*CASES, "evaluated"}
    for name in whole.keys() - {*REFUSED, "evaluated"}:
        weights, others = (torch.tensor(run[name]["weights"], dtype=torch.float64) for run in (whole, shared))
        assert float((weights - others).norm() / weights.norm()) < 1e-9, name
    for name in whole.keys() - {*REFUSED}:
        assert metrics(shared[name]) == pytest.approx(metrics(whole[name]), rel=1e-9), name
    one, several = (folder / str(number) / "atail" / "samples.jsonl" for number in (1, processes))
    assert one.read_text() == several.read_text()


def test_the_cases_differ_and_learn(alone):
    _, whole = alone
    assert whole["a tail"]["accuracy"] > 0.8
    assert all(whole[name]["loss"] != whole["a tail"]["loss"] for name in ("masked", "weighed", "sparse"))
    assert metrics(whole["masked, in parts"]) == pytest.approx(metrics(whole["masked, by a tensor"]))
