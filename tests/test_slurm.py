"""scripts/slurm.sh with stand-ins for Slurm, the launcher and the training, that behave as the real ones do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

# TERM makes srun kill its tasks; USR1 goes to the task's first process alone, or to all, as the cluster is set up.
SRUN = """
import json, os, signal, subprocess, sys
from pathlib import Path

flags, command = sys.argv[1 : sys.argv.index("bash")], sys.argv[sys.argv.index("bash") :]
Path("srun.json").write_text(json.dumps(flags))
(tasks,) = (int(flag.split("=")[1]) for flag in flags if flag.startswith("--ntasks="))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
ready = lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGTERM])
running = [
    subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(node)}, start_new_session=True, preexec_fn=ready)
    for node in range(tasks)
]
send = os.killpg if "SIGNAL_ALL" in os.environ else os.kill
signal.signal(signal.SIGUSR1, lambda *_: [send(task.pid, signal.SIGUSR1) for task in running])
signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGKILL) for task in running])
ready()
sys.exit(max(abs(task.wait()) for task in running))
"""

# What is asked of scontrol, with the state of the run and the training processes that live at that moment.
SCONTROL = """
import json, os, sys
from pathlib import Path

if sys.argv[1:2] == ["show"]:
    print("node-a\\nnode-b")
    sys.exit(0)
status = next(Path().glob("*/x*/status.json"), None)
living = [path.name for path in Path("pids").iterdir() if Path("/proc", path.name).exists()]
with open("scontrol.jsonl", "a") as file:
    file.write(json.dumps([sys.argv[1:], json.loads(status.read_text())["state"], living]) + "\\n")
sys.exit(int(os.environ.get("SCONTROL_CODE", "0")))
"""

# Dies of every signal and leaves its process behind; 1 for every code but 0.
ACCELERATE = """
import os, subprocess, sys, time
from pathlib import Path

script = sys.argv.index("scripts/train.py")
Path(f"launch_{os.environ['SLURM_NODEID']}.txt").write_text(" ".join(sys.argv[1:script]))
time.sleep(float(os.environ.get("LAUNCH_SECONDS", "0")))
sys.exit(1 if subprocess.run([sys.executable, *sys.argv[script:]]).returncode else 0)
"""

# Ends as ENDS says; "saved" and "deaf" once they are asked to stop.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

node, ends, asked = os.environ["SLURM_NODEID"], os.environ["ENDS"], []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
Path(f"arguments_{node}.json").write_text(json.dumps(sys.argv[1:]))
run = Path(os.environ.get("RUN", "runs/x"))
run.mkdir(parents=True, exist_ok=True)

def status(state):
    (run / "status.json").write_text(json.dumps({"state": state}))

status("running")
Path("pids", str(os.getpid())).touch()
end = time.monotonic() + 30
while ends in ("saved", "deaf", "done in spite of it") and not asked and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(float(os.environ.get("SAVE_SECONDS", "0.1")))
Path(f"asked_{node}").write_text(str(len(asked)))
if ends == "deaf":
    sys.exit(1)
status({"saved": "preempted", "stopped by itself": "preempted", "done in spite of it": "done"}.get(ends, ends))
sys.exit({"saved": 75, "stopped by itself": 75, "failed": 1, "diverged": 3}.get(ends, 0))
"""


@pytest.fixture
def project(tmp_path) -> Path:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": ACCELERATE}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable} -S\n{text}")
        program.chmod(0o755)
    (tmp_path / "pids").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(TRAIN)
    shutil.copy(ROOT / "scripts" / "slurm.sh", tmp_path / "scripts")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


class Job:
    """The batch script of a job, running."""

    def __init__(self, project: Path, *flags: str, ends: str = "saved", nodes: int = 1, **variables: str):
        self.project, self.nodes = project, nodes
        slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "node-[a-b]"}
        path = f"{project / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.process = subprocess.Popen(
            ["bash", "scripts/slurm.sh", *flags],
            cwd=project,
            env=plain | slurm | {"PATH": path, "ENDS": ends} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until(self, pattern: str, count: int) -> None:
        end = time.monotonic() + 30
        while len(list(self.project.glob(pattern))) < count:
            assert time.monotonic() < end and self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def signal(self, *signals: int) -> Job:
        """As Slurm does with B: to this script alone."""
        self.wait_until("pids/*", self.nodes)
        for number in signals:
            self.process.send_signal(number)
            time.sleep(0.1)
        return self

    def end(self) -> tuple[int, str, str]:
        try:
            said, complaints = self.process.communicate(timeout=40)
        finally:
            self.process.kill()
        return self.process.returncode, said, complaints

    def asked_of_scontrol(self) -> list:
        file = self.project / "scontrol.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def times_asked_to_stop(self) -> list[int]:
        return [int(file.read_text()) for file in sorted(self.project.glob("asked_*"))]


X = ("--experiment_name", "x")


def test_a_preempted_run_is_queued_again_once_after_it_has_been_saved(project):
    job = Job(project, *X, SAVE_SECONDS="0.6").signal(signal.SIGUSR1)
    code, said, _ = job.end()
    assert job.asked_of_scontrol() == [[["requeue", "77"], "preempted", []]]
    assert job.times_asked_to_stop() == [1]
    assert (code, said) == (0, "queued again as job 77: runs/x is saved and will go on\n")


def test_a_second_warning_while_it_saves_changes_nothing(project):
    job = Job(project, *X, SAVE_SECONDS="0.6").signal(signal.SIGUSR1, signal.SIGUSR1)
    assert job.end()[0] == 0
    assert job.asked_of_scontrol() == [[["requeue", "77"], "preempted", []]]
    assert job.times_asked_to_stop() == [1]


def test_a_cluster_that_signals_every_process_of_a_step_stops_it_as_well(project):
    job = Job(project, *X, SIGNAL_ALL="1").signal(signal.SIGUSR1)
    assert job.end()[0] == 0
    assert job.asked_of_scontrol() == [[["requeue", "77"], "preempted", []]]


@pytest.mark.parametrize(("ends", "expected"), [("done", 0), ("failed", 1), ("diverged", 1), ("stopped by itself", 75)])
def test_what_was_not_preempted_is_not_queued_again(project, ends, expected):
    job = Job(project, *X, ends=ends)
    assert job.end()[0] == expected
    assert job.asked_of_scontrol() == []


@pytest.mark.parametrize(("ends", "expected"), [("done in spite of it", 0), ("deaf", 1)])
def test_a_run_that_did_not_save_for_the_warning_is_not_queued_again(project, ends, expected):
    job = Job(project, *X, ends=ends).signal(signal.SIGUSR1)
    assert job.end()[0] == expected
    assert job.times_asked_to_stop() == [1]
    assert job.asked_of_scontrol() == []


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGUSR1, signal.SIGTERM]])
def test_a_cancelled_run_is_saved_but_not_queued_again(project, signals):
    job = Job(project, *X, "--epochs", "7", SAVE_SECONDS="0.6").signal(*signals)
    code, said, _ = job.end()
    assert (code, job.asked_of_scontrol(), job.times_asked_to_stop()) == (75, [], [1])
    assert json.loads((project / "runs" / "x" / "status.json").read_text()) == {"state": "preempted"}
    assert said.splitlines()[-1] == "  sbatch scripts/slurm.sh --experiment_name x --epochs 7"


def test_a_signal_that_comes_before_the_training_process_waits_for_it(project):
    job = Job(project, *X, LAUNCH_SECONDS="1")
    job.wait_until("launch_0.txt", 1)
    job.process.send_signal(signal.SIGUSR1)
    job.end()
    # the stand-in may die of the signal before it can hear it: then nothing was lost, and nothing is queued again
    assert job.times_asked_to_stop() in ([], [1])
    assert len(job.asked_of_scontrol()) == len(job.times_asked_to_stop())


def test_a_refusal_of_scontrol_is_told_with_the_command_that_continues(project):
    job = Job(project, *X, SCONTROL_CODE="1").signal(signal.SIGUSR1)
    code, said, complaints = job.end()
    assert (code, len(job.asked_of_scontrol())) == (75, 1)
    assert complaints == "error: scontrol does not queue job 77 again\n"
    assert "sbatch scripts/slurm.sh --experiment_name x" in said


def test_arguments_arrive_as_they_were_typed(project):
    awkward = "my data/$(touch pwned) `touch pwned` *'\" \\ ; touch pwned -x %s {a,b} ~"
    flags = ["--experiment_name", "x", "--output_dir", "my runs", "--train_data_dir", awkward, "--wandb_project", "a b"]
    job = Job(project, *flags, RUN="my runs/x").signal(signal.SIGTERM)
    _, said, _ = job.end()
    assert json.loads((project / "arguments_0.json").read_text()) == flags
    assert not list(project.rglob("pwned"))
    command = said.partition("scripts/slurm.sh ")[2]
    typed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True, cwd=project
    ).stdout
    assert typed.split("\0")[:-1] == flags


def test_a_run_is_found_where_the_config_puts_it(project):
    (project / "my.yaml").write_text("output_dir: elsewhere\n")
    job = Job(project, "--config", "my.yaml", "--experiment-name=x-1", RUN="elsewhere/x-1").signal(signal.SIGUSR1)
    assert job.end()[:2] == (0, "queued again as job 77: elsewhere/x-1 is saved and will go on\n")


def test_a_task_of_a_job_array_is_queued_again_by_its_own_number(project):
    array = {"SLURM_JOB_ID": "80", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "4"}
    job = Job(project, "--experiment_name", "x-%a", "--seed", "%a", RUN="runs/x-4", **array).signal(signal.SIGUSR1)
    assert job.end()[0] == 0
    assert job.asked_of_scontrol() == [[["requeue", "77_4"], "preempted", []]]
    assert json.loads((project / "arguments_0.json").read_text()) == ["--experiment_name", "x-4", "--seed", "4"]


HOSTILE = ["", "-1", "7 8", "7;touch pwned", "$(touch pwned)", "7\n8", "7_4", "*", "a[$(touch pwned)]", "٧", "0x7"]


@pytest.mark.parametrize(
    ("name", "number"),
    [("SLURM_JOB_ID", number) for number in HOSTILE]
    + [(name, number) for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") for number in ("", "$(touch pwned)")],
)
def test_a_hostile_job_id_is_refused_before_anything_starts(project, name, number):
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "4"} if "ARRAY" in name else {}
    job = Job(project, *X, **(array | {name: number}))
    code, said, complaints = job.end()
    assert (code, said, complaints.count("\n")) == (2, "", 1)
    assert complaints.startswith(f"error: {name} is no number: ")
    assert {path.name for path in project.iterdir()} == {"bin", "configs", "pids", "scripts"}


@pytest.mark.parametrize(
    "flags", [[], ["--epochs", "3"], ["--experiment_name", "x", "--resume", "never"], ["--resume", "runs/x"]]
)
def test_a_run_that_could_not_find_itself_again_is_refused_in_a_line(project, flags):
    run = project / "runs" / "x"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("epochs: 3\n")
    job = Job(project, *flags)
    code, said, complaints = job.end()
    assert (code, said, complaints.count("\n")) == (2, "", 1)
    assert "give --experiment_name NAME and no --resume" in complaints
    assert not (project / "srun.json").exists()


def test_wrong_flags_are_refused_before_a_step_starts(project):
    job = Job(project, *X, "--epochs", "many")
    assert job.end()[0] == 2
    assert not (project / "srun.json").exists()


def test_it_does_not_run_outside_slurm_or_outside_the_project(project):
    def said_in(folder: Path, **variables: str) -> str:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        command = ["bash", str(ROOT / "scripts" / "slurm.sh"), *X]
        done = subprocess.run(command, cwd=folder, env=plain | variables, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert said_in(ROOT) == "error: this is no Slurm job: sbatch scripts/slurm.sh --experiment_name NAME\n"
    assert "submit from the project's root" in said_in(project / "pids", SLURM_JOB_ID="77")


def test_several_nodes_are_launched_as_one_run_and_each_is_asked_to_stop(project):
    job = Job(project, *X, nodes=2, SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="6").signal(signal.SIGUSR1)
    assert job.end()[0] == 0
    for node in (0, 1):
        assert (project / f"launch_{node}.txt").read_text() == (
            f"launch --machine_rank {node} --multi_gpu --num_machines 2 --num_processes 8 "
            "--main_process_ip node-a --main_process_port 20077"
        )
        assert json.loads((project / f"arguments_{node}.json").read_text()) == list(X)
    flags = json.loads((project / "srun.json").read_text())
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"} <= set(flags)
    assert "--kill-on-bad-exit=0" in flags  # the node that ends first must not end the one that still writes
    assert job.times_asked_to_stop() == [1, 1]
    assert len(job.asked_of_scontrol()) == 1


def test_several_nodes_without_gpus_are_refused(project):
    code, said, complaints = Job(project, *X, nodes=2).end()
    assert (code, said, complaints.count("\n")) == (2, "", 1)
    assert "--gpus-per-node" in complaints


def test_the_real_launcher_passes_on_what_is_typed_and_its_process_hears_the_signal(project):
    (project / "bin" / "accelerate").unlink()
    job = Job(project, *X, HF_HOME=str(project)).signal(signal.SIGUSR1)
    assert job.end()[0] == 0
    assert job.asked_of_scontrol() == [[["requeue", "77"], "preempted", []]]
    assert json.loads((project / "arguments_0.json").read_text()) == list(X)


def test_slurm_is_asked_for_the_warning_and_the_way_back_into_the_queue():
    head = (ROOT / "scripts" / "slurm.sh").read_text().split("\nset ")[0].splitlines()
    assert all(line.startswith("#") for line in head if line)  # sbatch reads no directive behind a command
    assert {match[1] for line in head if (match := re.fullmatch(r"#SBATCH (\S+)", line))} == {
        "--nodes=1",
        "--ntasks-per-node=1",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
    }
