"""What goes wrong between launchers and processes: each runs the command for itself, on machines of its own."""

from __future__ import annotations

import os
import reprlib
import socket
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from configs.environment import OFF, int_of, is_on
from configs.errors import ConfigError
from configs.options import Config

PLAIN = "accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes N scripts/train.py"
REQUESTS = [  # what launchers ask for by the environment: variable, what changes nothing, its meaning, what to do
    ("ACCELERATE_USE_DEEPSPEED", OFF, "DeepSpeed", PLAIN),
    ("ACCELERATE_USE_MEGATRON_LM", OFF, "Megatron-LM", PLAIN),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", OFF, "parallelism within a model (parallelism_config)", PLAIN),
    ("ACCELERATE_DYNAMO_BACKEND", OFF, "torch.compile (dynamo_config)", "leave it out there, and give --compile"),
    (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", (*OFF, "1"), "gradient accumulation",
        "leave it out there: --batch_size is that of a whole step, --micro_batch_size what a process computes at once",
    ),
]  # fmt: skip
REQUESTS_OF_FSDP = [
    (
        "FSDP_ACTIVATION_CHECKPOINTING", OFF, "fsdp_activation_checkpointing",
        "leave it out there, and give --gradient_checkpointing, which moves BatchNorm's statistics once",
    ),
    ("FSDP_OFFLOAD_PARAMS", OFF, "fsdp_offload_params", "leave it out there"),
    ("FSDP_IGNORED_MODULES", OFF, "fsdp_ignored_modules", "leave it out there"),
    (
        "FSDP_AUTO_WRAP_POLICY", (*OFF, "no_wrap", "transformer_based_wrap"), "fsdp_auto_wrap_policy by size",
        "take TRANSFORMER_BASED_WRAP there: each block of the model",
    ),
]  # fmt: skip
SRUN = "SLURM_STEP_NUM_TASKS"
MPI = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
OF_A_MACHINE = {
    "dataset", "mix_datasets", "train_data_dir", "val_data_dir", "test_data_dir", "data_files", "weights",
    "pretrained", "teacher", "output_dir", "resume", "num_workers", "debug",
}  # fmt: skip  # paths, mostly


def check_environment() -> None:
    """Raises ConfigError where processes are to find one another, and nobody told them how."""
    by_mpi = started_by_mpi()
    if by_mpi > 1 and "MASTER_ADDR" not in os.environ:
        raise unknown_to_each_other(by_mpi, 1)
    needs = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needs if name not in os.environ]
    if int_of("WORLD_SIZE") > 1 and by_mpi == 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {missing[0]} is not set: the processes would wait for ever",
            fix="start them by torchrun or accelerate launch, which set both",
        )


def started_by_mpi() -> int:
    return max(int_of(name) for name in MPI)


def started() -> int:
    """Processes that look for one another."""
    return max(int_of("WORLD_SIZE"), started_by_mpi())


def unknown_to_each_other(started: int, each_sees: int, otherwise: str = "") -> ConfigError:
    return ConfigError(
        f"srun or mpirun started {started} processes, but they do not know each other (each sees {each_sees})",
        fix=f"accelerate launch on each machine, as scripts/slurm.sh does{otherwise}",
    )


def check_requests() -> None:
    """Raises ConfigError where the launcher asks for what this trainer would not do, or not do right."""
    for variable, off, meaning, fix in [*REQUESTS, *(REQUESTS_OF_FSDP if is_on("ACCELERATE_USE_FSDP") else [])]:
        if is_on(variable, off):
            raise ConfigError(
                f"the launcher asks for {meaning}, which does not work with this trainer",
                where=f"{variable}={os.environ[variable]}, as accelerate launch sets it by its flags or its file",
                fix=fix,
            )


def check_processes_know_each_other(config: Config, accelerator: Accelerator) -> None:
    """srun and mpirun start the same command several times and leave it to that to find the others."""
    tasks, each_sees = max(started_by_mpi(), int_of(SRUN)), accelerator.num_processes
    if tasks > each_sees and config.expect_processes != each_sees:
        alone = f"; --expect_processes {each_sees} where each is meant to be a run of its own"
        raise unknown_to_each_other(tasks, each_sees, otherwise=alone)


def check_flags(config: Config, accelerator: Accelerator) -> None:
    flags = {f"--{name}": value for name, value in asdict(config).items() if name not in OF_A_MACHINE}
    check_same(flags, accelerator)


def check_same(named: dict[str, Any], accelerator: Accelerator) -> None:
    """Every process calls it. Raises ConfigError on all of them where one has another value of a name."""
    if accelerator.num_processes == 1:
        return
    (host, main), *others = gather_object([(socket.gethostname(), named)])
    for process, (other_host, other) in enumerate(others, 1):
        for name in main | other:
            one, another = main.get(name), other.get(name)
            if one != another:
                place, one, another = where_they_differ(one, another)
                raise ConfigError(
                    f"{name}{place} is {reprlib.repr(one)} on process 0 ({host}), "
                    f"and {reprlib.repr(another)} on process {process} ({other_host})",
                    fix="the same command and the same data on every machine",
                )


def where_they_differ(one: Any, other: Any) -> tuple[str, Any, Any]:
    """Of long lists the first entries that differ, and their place: all of them would not be shown."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        pairs = ((f" [{place}]", *pair) for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1])
        return next(pairs, ("", one, other))
    return "", one, other
