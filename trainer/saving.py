"""What a trainer saves and takes up again: checkpoints to continue from, best/ to use."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from trainer import checkpoint, run_folder, sharding
from trainer.model_card import model_card
from trainer.optim import same_kernels
from trainer.run_folder import write_whole

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer

# A full disk is told by each library in its own words.
WRITE_FAULTS = (OSError, RuntimeError, SafetensorError)


class Saver:
    """Saves checkpoints. The loop waits until the state lies in files; a thread then proves them, makes them durable
    and lets them appear, while training goes on. At most one is on its way."""

    def __init__(self, trainer: BaseTrainer):
        self.trainer = trainer
        self.thread: threading.Thread | None = None
        self.error: UserError | None = None  # of the thread, on the main process
        self.saved: dict[str, Any] | None = None  # the state that was saved last
        self.stall_seconds = 0.0  # that the loop waited since this was last read
        self.last_save = time.monotonic()

    @property
    def failed(self) -> bool:
        return self.error is not None

    def save(self) -> None:
        """All that is needed to continue, in one folder that appears whole. Every process calls it.

        Raises UserError on all of them where it, or the one before, cannot be written; what was saved before stands.
        """
        start, trainer = time.monotonic(), self.trainer
        state = trainer.state.to_json()
        if state == self.saved:  # a stop right after a save
            return
        hidden = trainer.run.checkpoints / f".step_{trainer.state.step:08d}"
        self.finish()
        from_main, step = trainer.processes.from_main, trainer.state.step
        from_main(lambda: self.guarded(hidden, lambda: checkpoint.begin(hidden.parent, step)))
        fault = self.caught(hidden, lambda: self.write_states(hidden))
        faults = trainer.processes.gather_lines([fault] if fault else [])  # the others' files lie there, too
        gathers = trainer.is_main or trainer.sharded
        averages = trainer.ema.state_dict(keep=trainer.is_main) if trainer.ema and gathers else None
        from_main(lambda: self.complete(hidden, state, averages, faults))
        self.saved, self.last_save = state, time.monotonic()
        self.stall_seconds += self.last_save - start

    def write_states(self, hidden: Path) -> None:
        """Of the model, the optimizers and the scaler."""
        if self.trainer.sharded:
            sharding.save(self.trainer, hidden)
        else:
            self.trainer.accelerator.save_state(str(hidden))

    def complete(
        self, hidden: Path, state: dict[str, Any], averages: dict[str, Tensor] | None, faults: list[UserError]
    ) -> None:
        """On the main process: what is ours beside Accelerate's files, then the thread."""
        if faults:
            shutil.rmtree(hidden, ignore_errors=True)
            raise faults[0]
        self.guarded(hidden, lambda: self.write_ours(hidden, state, averages))
        self.thread = threading.Thread(target=self.prove, args=(hidden, state), name="checkpoint")
        self.thread.start()

    def write_ours(self, hidden: Path, state: dict[str, Any], averages: dict[str, Tensor] | None) -> None:
        if averages is not None:
            save_file(averages, hidden / "ema.safetensors", metadata={"format": "pt"})
        (hidden / "config.json").write_text(json.dumps(self.trainer.plain_model.config(), indent=2))
        (hidden / "state.json").write_text(json.dumps(state, indent=1))

    def prove(self, hidden: Path, state: dict[str, Any]) -> None:
        """In the thread. It reads the trainer's config and paths alone."""
        try:
            self.guarded(hidden, lambda: self.trainer.run.make_durable())
            self.guarded(hidden, lambda: checkpoint.commit(hidden))
        except UserError as error:
            self.error = error
            return
        self.prune(state)

    def prune(self, state: dict[str, Any]) -> None:
        """Remove old checkpoints, which can wait where the disk does not let us."""
        config, checkpoints = self.trainer.config, self.trainer.run.checkpoints
        keep_steps = {step for _, step in state["best_steps"]}
        if config.nonfinite == "rollback":
            keep_steps.add(state["regular_step"])
        try:
            checkpoint.prune(checkpoints, keep_last=config.keep_last, keep_steps=keep_steps)
        except OSError as error:
            print(f"warning: an old checkpoint could not be removed: {error}", flush=True)

    def finish(self) -> None:
        """Wait for the checkpoint that is on its way. Raises what went wrong with it, on every process."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.trainer.processes.from_main(self.raise_error)

    def raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """When a run ends by an error of another kind: nothing is left half done, nothing more is raised."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            print(self.error, flush=True)

    def guarded(self, hidden: Path, write: Any) -> None:
        if fault := self.caught(hidden, write):
            raise fault

    def caught(self, hidden: Path, write: Any) -> UserError | None:
        """What keeps the files from being written, in one block; what was begun is removed."""
        try:
            write()
            return None
        except WRITE_FAULTS as error:
            fault = cannot_write(self.trainer, f"the checkpoint of step {step_in_name(hidden)}", hidden.parent, error)
            if self.trainer.is_main:  # it may still be writing there
                shutil.rmtree(hidden, ignore_errors=True)
            return fault


def step_in_name(hidden: Path) -> int | None:
    return checkpoint.step_of(hidden.with_name(hidden.name[1:]))


def cannot_write(trainer: BaseTrainer, what: str, folder: Path, error: Exception) -> UserError:
    """The library's words with what they often leave out: where, and how much room there is and should be."""
    tensors = [*trainer.plain_model.state_dict().values()] * (2 if trainer.ema else 1)
    tensors += [value for o in trainer.optimizers for state in list(o.state.values()) for value in state.values()]
    needed = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free, a checkpoint has {needed / 1e6:,.1f} MB"
    except OSError:
        free = "the folder has gone"
    lines = str(error).splitlines() or [type(error).__name__]
    return UserError(
        f"{what} could not be written: {lines[0]} ({free})",
        where=str(folder),
        fix="free some space; earlier checkpoints stand, the same command continues from the newest",
    )


def save_best(trainer: BaseTrainer, metrics: dict[str, float]) -> None:
    """best/: the model as `from_pretrained` loads it, with its averaged weights where there are such."""
    with trainer.averaged():
        whole = sharding.whole_weights(trainer) if trainer.sharded else None
        trainer.processes.from_main(lambda: write_best(trainer, metrics, whole))


def write_best(trainer: BaseTrainer, metrics: dict[str, float], whole: dict[str, Tensor] | None) -> None:
    """On the main process. whole: the weights, where the model itself has only parts of them."""
    best, model = trainer.run.best, trainer.plain_model
    part = "Validation" if trainer.val_loader is not None else "Training"
    try:
        best.mkdir(parents=True, exist_ok=True)
        write_whole(
            best / "README.md",
            model_card(trainer.config, model.config(), metrics, trainer.state.step, part, trainer.usage),
        )
        model.write(best, whole)
    except WRITE_FAULTS as error:
        raise cannot_write(trainer, "the best model", trainer.run.path, error) from error


def restore_best(trainer: BaseTrainer) -> list[str]:
    """best/ as it was at the step that a run goes back to: what came to be best later is of a course that is left."""
    run, monitor, model = trainer.run, trainer.state.monitor, trainer.plain_model
    if not run.best.is_dir():
        return []
    aside = run_folder.free_name(run.path / "set_aside_best")
    run.best.rename(aside)
    line = f"best/ may be of that course, too: now {aside.name}"
    source = run.checkpoints / f"step_{monitor.best_step or 0:08d}"
    if monitor.best_step is None or monitor.best is None or checkpoint.fault(source):
        return [line]
    part = "Validation" if trainer.val_loader is not None else "Training"
    metrics = {trainer.monitor: monitor.best}
    run.best.mkdir()
    shutil.copyfile(source / "config.json", run.best / "config.json")
    card = model_card(trainer.config, model.config(), metrics, monitor.best_step, part, trainer.usage)
    write_whole(run.best / "README.md", card)
    weights = "ema.safetensors" if trainer.ema is not None else "model.safetensors"
    shutil.copyfile(source / weights, run.best / "model.safetensors")
    return [f"{line}; best/ is that of step {monitor.best_step} again"]


def load_checkpoint(trainer: BaseTrainer, folder: Path) -> None:
    """Weights, optimizer and averages of a checkpoint. Raises UserError where one of them is not there."""
    wanted = ["model.safetensors", *(["scaler.pt"] if trainer.scaler is not None else [])]
    wanted += ["optimizer.bin" if not n else f"optimizer_{n}.bin" for n in range(len(trainer.optimizers))]
    wanted += ["ema.safetensors"] if trainer.ema is not None else []
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise UserError(
            f"the checkpoint has no {missing[0]}, which this run needs",
            where=str(folder),
            fix="continue from another checkpoint, or with the options that the run was begun with",
        )
    try:
        with same_kernels(trainer.optimizers):
            if trainer.sharded:
                sharding.load(trainer, folder)
            else:
                trainer.accelerator.load_state(str(folder))
        if trainer.ema is not None:
            trainer.ema.load_state_dict(load_file(folder / "ema.safetensors"))  # onto the CPU: no "cpu:0" there
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint does not fit the model: {' '.join(str(error).split())[:300]}",
            where=str(folder),
            fix="continue with the model and optimizer that the run was begun with",
        ) from error
    trainer.nonfinite.remember_buffers()


def name_of_non_finite(trainer: BaseTrainer) -> str:
    """The first weight, buffer or average that must not be saved; "" where all are finite."""
    tensors = [(name, sharding.part(tensor)) for name, tensor in trainer.plain_model.state_dict().items()]
    if trainer.ema is not None:
        tensors += [(f"the average of {name}", tensor) for name, tensor in trainer.ema.average.items()]
    floating = [(name, tensor.isfinite().all()) for name, tensor in tensors if tensor.is_floating_point()]
    finite = torch.stack([of_tensor for _, of_tensor in floating]).tolist()  # waits for the device once
    return next((name for (name, _), is_finite in zip(floating, finite) if not is_finite), "")


def roll_back(trainer: BaseTrainer, step: int) -> None:
    """Weights, optimizer and averages of the checkpoint of a step; where the run stands stays as it is."""
    trainer.saver.finish()
    folder = trainer.run.checkpoints / f"step_{step:08d}"
    if wrong := trainer.processes.from_main(lambda: checkpoint.fault(folder)):
        raise UserError(f"the checkpoint to go back to is damaged: {wrong}", where=str(folder))
    load_checkpoint(trainer, folder)
