"""How a run begins or goes on: its folder, its checkpoint, its threads, and what must be so before the first step."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.errors import ConfigError
from trainer import checkpoint, reporting, run_folder, saving
from trainer.device import default_threads
from trainer.state import TrainState
from trainer.trackers import open_trackers

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer


def find_checkpoint(trainer: BaseTrainer) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, in a folder that is this process's alone from here on; and lines to tell."""
    config, run = trainer.config, trainer.run
    run.lock()
    if run.checkpoints.is_dir() and run.locked:
        checkpoint.tidy(run.checkpoints)
    found, lines = run_folder.find_checkpoint(config, run.path)
    return found, lines + (run_folder.check_same_run(config, run.path) if found else [])


def read_state(trainer: BaseTrainer, folder: Path) -> TrainState:
    try:
        return TrainState.from_json(checkpoint.read_state(folder))
    except FileNotFoundError:
        if trainer.is_main:
            raise
        raise ConfigError(
            f"{socket.gethostname()} does not see the checkpoint that the run goes on from",
            where=str(folder.absolute()),
            fix="an --output_dir on a disk that all machines share; or copy the run folder to each of them",
        ) from None


def set_threads(trainer: BaseTrainer) -> None:
    """Their number decides the last bits: it is set before anything is computed, and kept at a resume."""
    config, state = trainer.config, trainer.state
    if config.cpu_threads or not trainer.resume_from:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.processes.number))
        state.cpu_threads = config.cpu_threads or default_threads(here)
    torch.set_num_threads(state.cpu_threads)


def check_lengths(trainer: BaseTrainer) -> None:
    """What only the loaders' lengths and the number of processes tell."""
    config, state = trainer.config, trainer.state
    samples = getattr(trainer.train_loader, "size", None)
    if trainer.resume_from and state.train_samples not in (None, samples):
        raise ConfigError(
            f"the run was begun with {state.train_samples:,} training samples, now there are {samples or 0:,}",
            where=str(trainer.run.path),
            fix="put the data back, or begin a run of another --experiment_name",
        )
    state.train_samples = samples
    if not config.max_steps and trainer.train_loader is not None and config.warmup_steps >= trainer.total_steps:
        raise ConfigError(
            f"--warmup_steps {config.warmup_steps} must be less than the run's {trainer.total_steps} steps"
        )
    if config.swa_start_epoch is not None and trainer.train_loader is not None:
        first, steps = config.swa_start_epoch, trainer.total_steps
        if first >= steps or trainer.epoch_lengths.total(first + 1) > steps:
            raise ConfigError(
                f"--swa_start_epoch {first}: no epoch from this one on (counted from 0) ends within the {steps} steps "
                "of the run",
                fix="begin earlier, or train longer",
            )
    shares = [size // trainer.processes.number for size in trainer.batch_sizes.all()]
    if (config.mixup or config.cutmix) and any(share % 2 for share in shares):
        raise ConfigError(
            f"--mixup and --cutmix pair samples, and each process has {' and '.join(map(str, shares))} of --batch_size "
            f"{' and '.join(map(str, trainer.batch_sizes.all()))}",
            fix="choose a batch size that is twice a multiple of the processes",
        )


def load_checkpoint(trainer: BaseTrainer) -> None:
    """Take up the checkpoint that the run continues from, once: a second train() goes on from where it is."""
    folder, trainer.resume_from = trainer.resume_from, None
    before, trainer.state.processes = trainer.state.processes, trainer.processes.number
    if folder is not None:
        saving.load_checkpoint(trainer, folder)
        trainer.saver.saved = trainer.state.to_json()
        if trainer.is_main:
            if before not in (None, trainer.processes.number):
                print(f"the number of processes was {before}, now {trainer.processes.number}")
            print(f"continuing {trainer.run.path} after step {trainer.state.step} (epoch {trainer.state.epoch + 1})")


def open_run(trainer: BaseTrainer) -> None:
    """Make the run folder or take it back to where the run goes on; begin the files of lines and the trackers."""
    config, state, run, accelerator = trainer.config, trainer.state, trainer.run, trainer.accelerator
    from_main = trainer.processes.from_main
    unnamed = config.resume == "auto" and (config.experiment_name is None or config.fresh)
    if from_main(lambda: run.create(only_new=unnamed and not state.step)) and trainer.is_main:
        print(f"run       {run.path}, since another run took the name")
    run.move_to(from_main(lambda: run.path))
    if trainer.is_main:
        left = checkpoint.set_aside(run.checkpoints, state.step)
        print(*left, *(saving.restore_best(trainer) if left else []), sep="\n", end="\n" if left else "")
    run.set_back(state.step, state.evaluated_step)
    trainer.processes.wait()  # all read what the main process has left of it
    trainer.bad_samples.remember()
    run.open(
        config,
        run_folder.environment(
            str(trainer.device),
            processes=accelerator.num_processes,
            sharded=trainer.sharded,
            mixed_precision=accelerator.mixed_precision,
            cpu_threads=state.cpu_threads,
        ),
    )
    run.status("running", **reporting.standing(trainer))
    if trainer.is_main:
        trainer.trackers = open_trackers(config, run.path, state.wandb_id)
