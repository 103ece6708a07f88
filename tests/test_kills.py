"""The real command, killed and signalled at any time, ends as the run that nobody disturbed, to the last bit.

python -m tests.test_kills 300 [SEED]     300 kills; more than half of them fall within 50 ms after a save has begun
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT, same_run
from trainer import checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")

# accumulation, dropout (of simple_cnn), augmentation, mixing, averaging, clipping: whatever has or draws state
OPTIONS = (
    "--epochs 3 --batch_size 96 --micro_batch_size 32 --augment trivialaugment --random_erasing 0.3 --mixup 0.2 "
    "--cutmix 1.0 --ema_decay 0.99 --grad_clip --warmup_steps 5 --trace_samples --log_every 4 --save_every_steps 4 "
    "--cpu_threads 1"
).split()
ONE = ["scripts/train.py"]
TWO = "-m torch.distributed.run --standalone --nproc_per_node 2 scripts/train.py".split()
ANSWER_SECONDS, ORPHAN_SECONDS = 20, 15
PHASES = ("start", "write", "step", "write", "write")  # where disturbances fall, in turn


class Session:
    """The command at work, or a launcher with its processes."""

    def __init__(self, command: list[str], run: Path, workers: int = 0):
        self.run, self.started = run, time.time()
        self.step = step_of_newest(run)
        names = ["--output_dir", str(run.parent), "--experiment_name", run.name]
        self.mark = "\0".join(names).encode()  # in the command line of all its processes
        words = [sys.executable, *command, *names, *OPTIONS, "--num_workers", str(workers)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        self.said = run.with_name(f"{run.name}.txt")
        with self.said.open("a") as said:
            self.process = subprocess.Popen(
                words, cwd=ROOT, stdout=said, stderr=said, env=environment, start_new_session=True
            )

    def living(self) -> dict[int, bytes]:
        """Processes of this run, loaders among them, and their environments."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark in (folder / "cmdline").read_bytes():
                    found[int(folder.name)] = (folder / "environ").read_bytes()
        return found

    def ended(self, seconds: float) -> bool:
        """Whether it ends in this time, with all of its processes."""
        return wait_until(lambda: self.process.poll() is not None and not self.living(), seconds)

    def process_of(self, rank: int) -> int:
        """The process that trains as this rank, not one of its loaders."""
        ranks = [number for number, environment in self.living().items() if f"\0RANK={rank}\0".encode() in environment]
        return min(ranks)

    def wrote(self, path: Path) -> bool:
        with suppress(FileNotFoundError):
            return path.stat().st_mtime > self.started
        return False

    def saves(self) -> bool:
        return any(map(self.wrote, (self.run / "checkpoints").glob(".step_*")))

    def steps(self) -> int:
        """The last step that is written down."""
        with suppress(FileNotFoundError):
            lines = (self.run / "samples.jsonl").read_text().splitlines(keepends=True)
            return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
        return 0

    def has_done(self, steps: int) -> bool:
        return self.wrote(self.run / "status.json") and self.steps() >= self.step + steps

    def reaches(self, phase: str, draw: random.Random) -> bool:
        """Wait for a moment of the phase; False where the run ended before."""
        steps = draw.randint(1, 6)
        if phase == "start":
            time.sleep(draw.uniform(0, 4))
        elif phase == "write":
            wait_until(lambda: self.saves() or self.process.poll() is not None, 180)
        else:
            wait_until(lambda: self.has_done(steps) or self.process.poll() is not None, 180)
        time.sleep(draw.uniform(0, 0.05))
        return self.process.poll() is None


Disturbance = Callable[[Session], None]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def step_of_newest(run: Path) -> int:
    found = checkpoint.all_checkpoints(run / "checkpoints")
    return (checkpoint.step_of(found[-1]) or 0) if found else 0


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def kill(session: Session) -> None:
    session.process.kill()
    session.process.wait()


def signalled(number: int, *, to: str) -> Disturbance:
    """A signal that a run has to answer by a save: to its process, its group, a rank, or its launcher."""

    def send(session: Session) -> None:
        if to == "group":
            os.killpg(session.process.pid, number)
        elif to.startswith("rank"):
            os.kill(session.process_of(int(to[-1])), number)
        else:
            session.process.send_signal(number)
        before = session.steps()
        orphaned = number == signal.SIGKILL
        assert session.ended(ORPHAN_SECONDS if orphaned else ANSWER_SECONDS), f"no end; {session.living().keys()} live"
        assert to != "launcher" or session.steps() <= before + 15, "it went on training"
        began = session.wrote(session.run / "status.json")
        if began and status(session.run)["state"] == "done":
            return  # it came after the last step
        if to in ("process", "group"):
            assert session.process.returncode == 75
        if began:
            found = status(session.run)
            assert found["state"] == "preempted"
            steps = [json.loads(line)["step"] for line in (session.run / "samples.jsonl").read_text().splitlines()]
            assert steps == list(range(1, found["step"] + 1))
            assert step_of_newest(session.run) == found["step"], "a step is to be done again"

    return send


def disturb(
    folder: Path, command: list[str], disturbances: Iterable[Disturbance], draw: random.Random, phases: Iterable[str]
) -> int:
    """Disturb run after run, each until it has ended, and compare; how many there were."""
    undisturbed = Session(command, folder / "undisturbed")
    numbers = itertools.count(1)
    run, sessions = folder / f"run_{next(numbers)}", []
    ended = []
    for disturbance, phase in zip(disturbances, phases):
        while True:
            session = Session(command, run, workers=draw.choice((0, 2)))
            sessions.append(session)
            if session.reaches(phase, draw):
                disturbance(session)
                break
            assert session.process.wait() == 0
            ended.append(run)
            run = folder / f"run_{next(numbers)}"
    assert Session(command, run, workers=2).process.wait(180) == 0
    assert undisturbed.process.wait(180) == 0
    for each in [*ended, run]:
        same_run(undisturbed.run, each)
        assert not list((each / "checkpoints").glob(".*")), "something half written is left"
        assert status(each)["state"] == "done"
    assert all(session.ended(ORPHAN_SECONDS) for session in sessions)
    return len(ended) + 1


SIGNALS = [
    signalled(signal.SIGTERM, to="process"),
    signalled(signal.SIGINT, to="group"),
    signalled(signal.SIGUSR1, to="process"),
]


def mixed(kills: int, signals: int, draw: random.Random) -> list[Disturbance]:
    several = [kill] * kills + (SIGNALS * signals)[:signals]
    draw.shuffle(several)
    return several


def test_five_kills_and_three_signals_change_nothing(tmp_path):
    draw = random.Random(1)
    disturb(tmp_path, ONE, mixed(5, 3, draw), draw, itertools.cycle(PHASES))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 5))
def test_thirty_kills_and_twelve_signals_change_nothing(tmp_path, seed):
    draw = random.Random(seed)
    disturb(tmp_path, ONE, mixed(10, 4, draw), draw, itertools.cycle(PHASES))


def test_two_processes_answer_a_signal_to_either_of_them_and_outlive_no_launcher(tmp_path):
    several = [
        signalled(signal.SIGTERM, to="rank 1"),
        signalled(signal.SIGKILL, to="launcher"),
    ]
    disturb(tmp_path, TWO, several, random.Random(5), itertools.repeat("step"))


@pytest.mark.long
@pytest.mark.parametrize("phases", [["step"], ["write"], ["start", "step", "write"]])
def test_two_processes_answer_signals_at_any_time(tmp_path, phases):
    several = [
        signalled(number, to=to)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        for to in ("rank 0", "rank 1")
        if phases[0] != "start"
    ]
    several += [signalled(number, to="launcher") for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)]
    disturb(tmp_path, TWO, several, random.Random(6), itertools.cycle(phases))


if __name__ == "__main__":
    kills, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as root:
        runs = disturb(Path(root), ONE, [kill] * kills, random.Random(seed), itertools.cycle(PHASES))
    print(f"{kills} kills in {runs} runs (seed {seed}): each ended as the undisturbed one, to the last bit")
