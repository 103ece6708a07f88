"""Each sample counts once, whatever the task and the number of processes: the reference is one process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data.embedded import load_digits
from tests.conftest import ROOT
from tests.evaluations import SIZES, TARS, TASKS

EXACT = ("accuracy", "recall", "map")  # metrics of counts


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """The first digits, in files that do not tell how many they hold."""
    folder, digits = tmp_path_factory.mktemp("tars"), load_digits()
    for size in TARS:
        with tarfile.open(folder / f"{size}.tar", "w") as tar:
            for place in range(size):
                picture = io.BytesIO()
                Image.fromarray(digits.images_NCHW[place, 0].numpy()).save(picture, "PNG")
                for suffix, content in (("png", picture.getvalue()), ("cls", str(digits.labels[place]).encode())):
                    entry = tarfile.TarInfo(f"{place:02d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def measured(tars: Path, processes: int) -> dict[str, dict[str, float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    file = tars / f"{processes}.json"
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "tests/evaluations.py", str(file), str(tars)],
        cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def alone(tars) -> dict[str, dict[str, float]]:
    return measured(tars, 1)


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 4))])
def test_any_number_of_processes_measures_the_same(tars, alone, processes):
    """Of 1, 2, 3, 5 and 35 samples: fewer than processes, and such as they cannot share evenly."""
    together = measured(tars, processes)
    assert together.keys() == alone.keys()
    assert len(alone) == 2 * len(TASKS) * len(SIZES) + len(TARS)
    for name, metrics in alone.items():
        assert together[name] == pytest.approx(metrics, rel=1e-6, abs=1e-9), name
        counted = {metric for metric in metrics if any(word in metric for word in EXACT)}
        assert counted, name
        assert {metric: together[name][metric] for metric in counted} == {n: metrics[n] for n in counted}, name


@pytest.mark.parametrize(
    ("task", "metric"), [("classification", "accuracy"), ("image_text", "recall_at_10"), ("detection", "map")]
)
def test_what_is_compared_is_neither_nothing_nor_all(alone, task, metric):
    assert all(0.05 < alone[f"{task}, {source}, {max(SIZES)}"][metric] < 0.95 for source in ("at hand", "streamed"))
