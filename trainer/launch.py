"""What goes wrong between launchers and processes: each runs the command for itself, on machines of its own."""

from __future__ import annotations

import os
import reprlib
import socket
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from configs.errors import ConfigError
from configs.options import Config

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")  # of srun and mpirun
OF_A_MACHINE = {
    "dataset", "mix_datasets", "train_data_dir", "val_data_dir", "test_data_dir", "data_files", "weights",
    "pretrained", "teacher", "output_dir", "resume", "num_workers", "debug",
}  # fmt: skip  # paths, mostly


def check_processes_know_each_other(config: Config, accelerator: Accelerator) -> None:
    """srun and mpirun start the same command several times and leave it to that to find the others."""
    started, each_sees = max(int(os.environ.get(name, "1")) for name in TASKS), accelerator.num_processes
    if started > each_sees and config.expect_processes != each_sees:
        raise ConfigError(
            f"srun or mpirun started {started} processes, but they do not know each other (each sees {each_sees})",
            fix="accelerate launch on each machine, as scripts/slurm.sh does; "
            f"--expect_processes {each_sees} where each is meant to be a run of its own",
        )


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
            if main.get(name) != other.get(name):
                raise ConfigError(
                    f"{name} is {reprlib.repr(main.get(name))} on process 0 ({host}), "
                    f"and {reprlib.repr(other.get(name))} on process {process} ({other_host})",
                    fix="the same command and the same data on every machine",
                )
