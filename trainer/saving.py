"""What a trainer saves and takes up again: checkpoints to continue from, best/ to use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from trainer import checkpoint, run_folder
from trainer.model_card import model_card

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer


def save_checkpoint(trainer: BaseTrainer) -> None:
    """All that is needed to continue, in one folder that appears whole. Every process calls it.

    Raises UserError where it cannot be written; what was saved before stands.
    """
    hidden = trainer.run.checkpoints / f".step_{trainer.state.step:08d}"
    try:
        write_checkpoint(trainer, hidden)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is told by each library in its own words
        weights_bytes = sum(p.numel() * p.element_size() for p in trainer.plain_model.parameters())
        free_bytes = shutil.disk_usage(trainer.run.path).free
        shutil.rmtree(hidden, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {trainer.state.step} could not be written: {str(error).splitlines()[0]} "
            f"({free_bytes / 1e6:,.1f} MB free, {weights_bytes / 1e6:,.1f} MB of weights to write)",
            where=str(trainer.run.checkpoints),
            fix="free some space; earlier checkpoints stand, the same command continues from the newest",
        ) from error


def write_checkpoint(trainer: BaseTrainer, hidden: Path) -> None:
    state, folder, accelerator = trainer.state, trainer.run.checkpoints, trainer.accelerator
    if trainer.is_main:
        checkpoint.begin(folder, state.step)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(hidden))
    accelerator.wait_for_everyone()
    if trainer.is_main:
        if trainer.ema is not None:
            save_file(trainer.ema.state_dict(), hidden / "ema.safetensors", metadata={"format": "pt"})
        run_folder.write_whole(hidden / "config.json", json.dumps(trainer.plain_model.config(), indent=2))
        checkpoint.commit(hidden, state.to_json())
        best_steps = {step for _, step in state.best_steps}
        checkpoint.prune(folder, keep_last=trainer.config.keep_last, keep_steps=best_steps)
        trainer.run.status("running", **trainer.standing())
    accelerator.wait_for_everyone()


def save_best(trainer: BaseTrainer, metrics: dict[str, float]) -> None:
    """best/: the model as `from_pretrained` loads it, with its averaged weights where there are such."""
    if trainer.is_main:
        best, model = trainer.run.best, trainer.plain_model
        part = "Validation" if trainer.val_loader is not None else "Training"
        best.mkdir(parents=True, exist_ok=True)
        run_folder.write_whole(
            best / "README.md", model_card(trainer.config, model.config(), metrics, trainer.state.step, part)
        )
        with trainer.averaged():
            model.save_pretrained(best)


def load_checkpoint(trainer: BaseTrainer) -> None:
    """Weights, optimizer and averages of the checkpoint to continue from, where there is one."""
    if trainer.resume_from is None:
        return
    folder, trainer.resume_from = trainer.resume_from, None  # once: a second train() goes on from where it is
    trainer.accelerator.load_state(str(folder))
    if trainer.ema is not None:
        file = folder / "ema.safetensors"
        if not file.is_file():
            raise UserError(
                "the checkpoint has no averaged weights", where=str(file), fix="continue without --ema_decay"
            )
        trainer.ema.load_state_dict(load_file(file, device=str(trainer.device)))
    if trainer.is_main:
        print(f"continuing {trainer.run.path} after step {trainer.state.step} (epoch {trainer.state.epoch + 1})")
