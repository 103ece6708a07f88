"""What the launcher's files really start, and what is refused because it would silently start something else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from configs.arguments import make_config
from configs.errors import ConfigError
from scripts.multi_gpu import start_on_all_gpus
from tests.conftest import ROOT, lines_of
from trainer import launch, sharding
from trainer.device import make_accelerator

FILES = ROOT / "accelerate_configs"
# Each process tells what it is, and what all of them are together.
PROBE = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
from configs.arguments import make_config
from trainer.device import make_accelerator
accelerator = make_accelerator(make_config())
together = accelerator.reduce(torch.ones(()), "sum").item()
found = [accelerator.process_index, accelerator.num_processes, together, accelerator.mixed_precision]
with open({folder!r} + "/" + os.environ.get("RANK", "0"), "w") as file:
    json.dump([*found, accelerator.device.type, os.environ.get("CUDA_VISIBLE_DEVICES")], file)
accelerator.end_training()
"""


def start(file: str, folder: Path, *flags: str) -> subprocess.Popen[str]:
    """accelerate launch, with no GPU to be found, of the probe."""
    probe = folder / "probe.py"
    probe.write_text(PROBE.format(root=str(ROOT), folder=str(folder)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES / f"{file}.yaml"), *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.Popen(
        [*launch, str(probe)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def found(folder: Path) -> list[list]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*"))]


@pytest.mark.parametrize(
    ("file", "flags", "processes"),
    [
        ("cpu", [], 1),
        ("cpu_2", [], 2),
        ("single_gpu", [], 1),
        ("ddp", ["--num_processes", "2"], 2),
    ],
)
def test_a_launch_file_starts_what_it_says(tmp_path, monkeypatch, file, flags, processes):
    """On the GPUs that the user has chosen, which are none here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "77")
    done = start(file, tmp_path, *flags)
    said, _ = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert found(tmp_path) == [[r, processes, processes, "no", "cpu", "77"] for r in range(processes)]


def test_two_machines_compute_together(tmp_path):
    """Two launchers of this machine, each with one process."""
    port = free_port()
    there = ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    nodes = [start("multi_node", tmp_path, *there, "--machine_rank", str(rank)) for rank in (0, 1)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert [line[:3] for line in found(tmp_path)] == [[0, 2, 2], [1, 2, 2]]


def on_two_machines(*flags: list[str], folders: tuple[Path, Path] = (ROOT, ROOT)) -> list[str]:
    """What the real command says on each of them, given its own flags; it has to fail on one at least."""
    port = free_port()
    there = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    launch = [sys.executable, "-m", "torch.distributed.run", *there]
    machines = [
        subprocess.Popen(
            [*launch, "--node_rank", str(rank), "--", str(ROOT / "scripts/train.py"), *own],
            cwd=folders[rank], env=os.environ | {"ACCELERATE_USE_CPU": "true"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, own in enumerate(flags)
    ]  # fmt: skip
    said = [machine.communicate(timeout=180)[0] for machine in machines]
    assert any(machine.returncode for machine in machines), said
    return said


def test_a_flag_that_differs_between_machines_is_refused(tmp_path):
    run = ["--output_dir", str(tmp_path), "--experiment_name", "x"]
    said = on_two_machines([*run, "--lr", "0.1"], [*run, "--lr", "0.2"])
    assert "error: --lr is 0.1 on process 0 (" in said[0] and "), and 0.2 on process 1 (" in said[0]
    assert not (tmp_path / "x").exists()


@pytest.mark.long
def test_data_that_differ_between_machines_are_refused(tmp_path, image_folder):
    copy = tmp_path / "copy"
    shutil.copytree(image_folder, copy)
    next((copy / "dark").iterdir()).unlink()
    run = ["--image_size", "16", "--batch_size", "4", "--output_dir", str(tmp_path), "--experiment_name", "x"]
    said = on_two_machines(*([*run, "--train_data_dir", str(data)] for data in (image_folder, copy)))
    assert "error: the number of training samples is " in said[0]
    shutil.rmtree(copy)
    said = on_two_machines(*([*run, "--train_data_dir", str(data)] for data in (image_folder, copy)))
    assert "[process 1] error: no such folder of images" in said[1]
    assert "another one has ended" in said[0]


@pytest.mark.long
def test_a_checkpoint_that_one_machine_does_not_see_is_named(tmp_path):
    machines = tmp_path / "one", tmp_path / "other"
    for machine in machines:
        machine.mkdir()
    run = ["--experiment_name", "x", "--max_steps", "4"]
    stop = [*run, "--stop_after_steps", "2"]
    assert "--resume runs/x" in on_two_machines(stop, stop, folders=machines)[0]
    said = on_two_machines(run, run, folders=machines)
    assert "does not see the checkpoint that the run goes on from" in said[1]
    assert "all machines share" in said[1]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"--lr": 0.1, "classes": ["a"]}, None),
        ({"--lr": 0.1, "classes": ["b"]}, r"classes \[0\] is 'a' on process 0 \(.*\), and 'b' on process 1"),
        ({"--lr": 0.1, "classes": ["a"], "more": 1}, "more is None on process 0 .*, and 1 on process 1"),
        ({"--lr": 0.1, "classes": []}, r"classes is \['a'\] on process 0 \(.*\), and \[\] on process 1"),
    ],
)
def test_processes_that_were_told_different_things_are_refused(monkeypatch, other, words):
    monkeypatch.setattr(launch, "gather_object", lambda mine: [*mine, ("elsewhere", other)])
    two = SimpleNamespace(num_processes=2)
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        launch.check_same({"--lr": 0.1, "classes": ["a"]}, two)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_that_do_not_know_each_other_are_refused(monkeypatch, name):
    """Unless each is said to be a run of its own."""
    alone, config = SimpleNamespace(num_processes=1), make_config()
    launch.check_processes_know_each_other(config, alone)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ConfigError, match="started 4 processes, but they do not know each other"):
        launch.check_processes_know_each_other(config, alone)
    launch.check_processes_know_each_other(make_config(expect_processes=1), alone)
    if launch.started_by_mpi() > 1:  # whom Accelerate would let wait for one another
        with pytest.raises(ConfigError) as refused:
            make_accelerator(make_config(expect_processes=1))
        assert "--expect_processes" not in str(refused.value)
    launch.check_processes_know_each_other(config, SimpleNamespace(num_processes=8))


def test_a_plain_command_starts_a_process_for_each_gpu(tmp_path):
    """Two GPUs are seen where there are none: their processes then find the CPU."""
    two_gpus = (
        "import sys, torch; torch.cuda.device_count = lambda: 2; from scripts.train import main; main(sys.argv[1:])"
    )
    flags = "--use_multigpu --expect_processes 2 --max_steps 2 --batch_size 8 --log_every 1 --experiment_name x".split()
    command = [sys.executable, "-c", two_gpus, *flags, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "2 process(es) x 1 x 4" in done.stdout
    assert json.loads((tmp_path / "x" / "env.json").read_text())["processes"] == 2


def test_where_one_gpu_or_none_is_seen_the_process_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", None)
    for gpus, words in [(0, "no GPU"), (1, "1 GPU")]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        start_on_all_gpus([])
        assert f"note      --use_multigpu: {words} is visible, one process trains" in capsys.readouterr().out


def test_another_number_of_processes_than_expected_is_refused():
    with pytest.raises(ConfigError, match="--expect_processes 2, but the launcher started 1"):
        make_accelerator(make_config(expect_processes=2))
    make_accelerator(make_config(expect_processes=1))


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "asks for parallelism within a model"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "give --compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--batch_size is that of a whole step"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "asks for fp8 precision"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "give --gradient_checkpointing"),
        ("FSDP_OFFLOAD_PARAMS", "true", "asks for fsdp_offload_params"),
        ("FSDP_IGNORED_MODULES", "body.0", "asks for fsdp_ignored_modules"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "take TRANSFORMER_BASED_WRAP"),
    ],
)
def test_what_the_launcher_asks_for_in_vain_is_refused(monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    if variable.startswith("FSDP"):
        launch.check_requests()  # nobody asks for FSDP
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError) as refused:
        make_accelerator(make_config())
    assert words in str(refused.value)


def test_what_the_launcher_says_without_being_told_is_no_request(monkeypatch):
    for name in ("DYNAMO_BACKEND=NO", "GRADIENT_ACCUMULATION_STEPS=1", "USE_DEEPSPEED=false", "USE_FSDP=true"):
        monkeypatch.setenv(f"ACCELERATE_{name.split('=')[0]}", name.split("=")[1])
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    launch.check_requests()


def test_fsdp_where_it_would_silently_be_something_else_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP 1, whose checkpoints do not continue exactly"):
        make_accelerator(make_config())
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match=r"asks for FSDP, and what there is would be 1 process\(es\) without"):
        make_accelerator(make_config())


@pytest.mark.parametrize(
    ("options", "precision", "words"),
    [
        ({}, "fp16", "--mixed_precision fp16 does not go"),
        ({"channels_last": True}, "no", "--channels_last does not go"),
    ],
)
def test_what_sharded_weights_cannot_do_is_refused(options, precision, words):
    sharding.check_options(make_config(), "bf16")
    with pytest.raises(ConfigError, match=words):
        sharding.check_options(make_config(**options), precision)


def test_two_optimizers_that_a_scaler_would_tell_apart_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="--optimizer muon does not go with fp16"):
        make_accelerator(make_config(mixed_precision="fp16", optimizer="muon"))


def test_bf16_where_a_gpu_merely_emulates_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ConfigError, match="Tesla T4 cannot compute in bf16"):
        make_accelerator(make_config(mixed_precision="bf16"))


def test_the_fsdp_file_shards_and_computes_in_the_precision_of_the_run(tmp_path):
    """A model with BatchNorm in bf16, on a CPU: the launcher and the run are told that they may."""
    flags = "--model bn_net --max_steps 20 --micro_batch_size 16 --mixed_precision bf16 --output_dir"
    run = [*flags.split(), str(tmp_path)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES / "fsdp2.yaml")]
    two = [*launch, "--num_processes", "2", "tests/bn_net.py", *run, "--experiment_name", "two"]
    one = [sys.executable, "tests/bn_net.py", *run, "--experiment_name", "one"]
    for command, environment in [(two, {"FSDP_ON_CPU": "1"}), (one, {})]:
        everything = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
        done = subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        assert ("sharded by FSDP2" in done.stdout) == (command is two)
    sharded, plain = (lines_of(tmp_path / name, "epoch", "val") for name in ("two", "one"))
    assert sharded[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-3)
    first = [lines_of(tmp_path / name, "train")[0] for name in ("two", "one")]
    assert first[0]["step"] == 1
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)  # in float32 it is 1e-3 away
    weights = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("two", "one")]
    assert all(weights[0][name].dtype == value.dtype for name, value in weights[1].items())


def test_double_precision_is_refused_beside_a_lower_one():
    with pytest.raises(ConfigError, match="--dtype float64 cannot be had with --mixed_precision bf16"):
        make_accelerator(make_config(dtype="float64", mixed_precision="bf16"))


def test_every_launch_file_is_tested_and_in_the_readme():
    names = {path.stem for path in FILES.glob("*.yaml")}
    assert names == {"cpu", "cpu_2", "single_gpu", "ddp", "fsdp2", "multi_node"}
    assert all(f"| `{name}.yaml" in (ROOT / "README.md").read_text() for name in names)
    assert all(yaml.safe_load((FILES / f"{name}.yaml").read_text())["mixed_precision"] == "no" for name in names)
