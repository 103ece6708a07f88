"""What several processes meet is told once, and what one of them meets by that one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from configs import telling
from configs.errors import DataError
from scripts import report
from tests.conftest import ROOT

SLOW = """
import os, sys, time
sys.path.insert(0, {root!r})
from scripts.train import main
if os.environ["RANK"] == "0":
    time.sleep(2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("flags", "words"), [(["--lrr", "1"], "unknown flag --lrr"), (["--model", "nope"], "no model is called 'nope'")]
)
def test_a_fault_of_all_is_told_once_though_the_first_process_is_the_last_to_meet_it(tmp_path, flags, words):
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(tmp_path / "slow.py"), *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and words in done.stderr
    assert "stopped by" not in done.stderr


def test_a_process_that_waits_for_its_end_ends_by_any_signal():
    code = "from configs.arguments import parse; import sys; print('begun', flush=True); parse(['--lr', 'nan'])"
    waiting = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"RANK": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert waiting.stdout.readline() == "begun\n"
    time.sleep(0.5)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.communicate(timeout=60) == ("", "")
    assert waiting.returncode == -signal.SIGTERM


def test_a_fault_that_the_first_process_does_not_meet_is_told_in_the_end():
    code = "from configs import arguments, telling; telling.PATIENCE_SECONDS = 0; arguments.parse(['--lr', 'nan'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"RANK": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("[process 1] error: --lr is nan")


def test_a_fault_that_one_process_alone_meets_is_told_by_it_at_once(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(telling.time, "sleep", lambda seconds: pytest.fail("it waits for the first process"))
    error = DataError("a block is broken", where="file")
    error.of_one_process = True
    assert report.fail(error, debug=False) == 1
    assert capsys.readouterr().err.startswith("[process 1] error: a block is broken")
    assert report.fail(RuntimeError("Connection closed by peer"), debug=False) == 1
    assert capsys.readouterr().err == ""  # that one tells why
