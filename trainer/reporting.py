"""What a run writes down while it trains: lines of metrics.jsonl and samples.jsonl, and the same to the trackers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import ConfigError
from trainer import mfu
from trainer.metrics import means
from trainer.progress import EpochBar

if TYPE_CHECKING:
    from trainer.base_trainer import BaseTrainer


def log_step(trainer: BaseTrainer, bar: EpochBar) -> None:
    """The means since the last log line. Here, and nowhere else in the loop, the device is waited for."""
    state = trainer.state
    trainer.meter.read(state.window_sums, state.epoch_sums)
    values = {**means(state.window_sums), "lr": trainer.lr}
    if trainer.grad_norm is not None and math.isfinite(norm := float(trainer.grad_norm)):
        values["grad_norm"] = norm
    state.window_sums = {}
    share_bad_samples(trainer)
    trainer.run.log("train", {"step": state.step, "epoch": state.epoch, **values})
    track(trainer, {f"train/{name}": value for name, value in values.items()})
    bar.show(values)


def log_speed(trainer: BaseTrainer) -> None:
    """Of the epoch's training: samples a second, the share of time that data and saves were waited for, and how much
    of what the devices can compute was made use of. The memory is that of the evaluation, too."""
    values = trainer.clock.speed() | {"save_stall_seconds": trainer.saver.stall_seconds}
    trainer.saver.stall_seconds = 0.0
    if trainer.device.type == "cuda":
        values["peak_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
        torch.cuda.reset_peak_memory_stats(trainer.device)
    if (used := utilization(trainer, values["samples_per_second"])) is not None:
        values["mfu"] = used
    trainer.run.log("speed", {"step": trainer.state.step, "epoch": trainer.state.epoch, **values})
    track(trainer, {f"speed/{name}": value for name, value in values.items()})


def utilization(trainer: BaseTrainer, samples_per_second: float) -> float | None:
    """None where the devices' peak or the step's FLOPs are not known."""
    device, flops = trainer.device, trainer.forward_flops
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = mfu.peaks(name, mfu.precisions(trainer.accelerator.mixed_precision, trainer.config.dtype))
    if found is None or flops is None or trainer.plain_model.frozen:  # a body that rests has no backward pass
        return None
    return mfu.utilization(samples_per_second, flops, found, trainer.processes.number)


def track(trainer: BaseTrainer, values: dict[str, Any]) -> None:
    for tracker in trainer.trackers:
        tracker.log(values, trainer.state.step)


def trace_samples(trainer: BaseTrainer) -> None:
    """The ids of the whole global batch, as they were computed."""
    batches = trainer.window.batches
    if "ids" not in batches[0]:
        raise ConfigError("--trace_samples needs batches that are dicts with `ids`", fix="leave it out")
    ids = torch.cat([batch["ids"].to(trainer.device) for batch in batches])
    trainer.run.log_samples(trainer.state.step, trainer.state.epoch, trainer.processes.gather_rows(ids).tolist())


def share_bad_samples(trainer: BaseTrainer) -> None:
    trainer.bad_samples.share(trainer.state.step * trainer.config.batch_size)


def standing(trainer: BaseTrainer) -> dict[str, Any]:
    """Step, epoch and the best evaluation so far."""
    state, best = trainer.state, trainer.state.monitor
    found = {"metric": trainer.monitor, "value": best.best, "step": best.best_step, "epoch": best.best_epoch}
    return {"step": state.step, "epoch": state.epoch, "best": found if best.best is not None else None}


def where_it_is(trainer: BaseTrainer) -> str:
    """The step, and the samples of this process that are computed on, for the words of an error."""
    try:
        ids = [id for batch in trainer.window.batches for id in batch.get("ids", torch.empty(0)).tolist()]
    except RuntimeError:  # the device itself has failed, and gives nothing back
        ids = []
    samples = f", samples {', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''}" if ids else ""
    return f"after step {trainer.state.step} of the run{samples}"
