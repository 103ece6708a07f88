"""One session of a run: say what it is, train, say what came of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from configs.environment import is_on
from configs.options import Config
from data.balance import effective_counts, rare_classes, repeats
from data.dataset import Data
from data.order import TrainOrder, even_parts, parts
from data.sequential import SequentialStream
from data.stream import Stream
from models.summary import cost, summarize
from scripts import preflight
from scripts.columns import wrapped
from scripts.report import leave
from scripts.wiring import build_trainer, device_name, outline, titled
from trainer import signals
from trainer.base_trainer import BaseTrainer
from trainer.optim import peak_lr

EXIT_CODES = {"done": 0, "preempted": 75}


def run(config: Config) -> int:
    if config.check:
        return preflight.check(config)
    with signals.at_once():  # nothing is to be saved yet
        trainer, data, lines = build_trainer(config)
        if trainer.is_main:
            print_summary(trainer, data, lines)
    result = trainer.train()
    if trainer.is_main:
        print_result(trainer, result)
        if config.push_to_hub and result["state"] == "done":
            from scripts.push import push_folder

            with signals.at_once():
                print(push_folder(trainer.run.best, str(config.hub_model_id)))
    trainer.accelerator.end_training()
    code = EXIT_CODES[result["state"]]
    if any(tracker.failed for tracker in trainer.trackers):
        leave(code)
    return code


def print_summary(trainer: BaseTrainer, data: Data, lines: list[str]) -> None:
    """One screen: the run, the model, the data, the course of training, the machine."""
    config, accelerator = trainer.config, trainer.accelerator
    micro = even_parts(trainer.batch_share, config.micro_batch_size)
    splits = [("train", data.train), ("validation", data.val)]
    sizes = " · ".join(
        f"{name} {len(split):,}" if split.counted else f"{name} ?" for name, split in splits if split is not None
    )
    sizes += f" · test {data.held_out:,}" if data.held_out else ""
    dropped = left_out_each_epoch(trainer.train_loader, trainer.batch_size)
    later = "".join(
        f", {size} from epoch {epoch + 1} on"
        for epoch, size in trainer.batch_sizes.later
        if epoch > trainer.state.epoch and (config.max_steps or epoch < config.epochs)
    )
    epochs = f"{config.epochs} epoch" + ("s" if config.epochs > 1 else "")
    length = f"{epochs} of {trainer.steps_per_epoch:,} steps"
    if config.max_steps or later:
        length = ("" if config.max_steps else f"{epochs}, ") + f"{trainer.total_steps:,} steps"
    model = outline(config, data) if trainer.sharded or config.sync_batch_norm else trainer.plain_model
    at = data.info.channels, data.image_size, micro
    found = cost(model, *at)
    trainer.forward_flops = found.convolution_flops, found.flops - found.convolution_flops
    training = f"{length}, batch {trainer.batch_size} = {cut(trainer, accelerator.num_processes)}{later}"
    training += f"; {dropped} samples sit out each epoch" if dropped and not later else ""
    optimizing = (
        f"{config.optimizer}, lr {peak_lr(config, trainer.batch_size):g}, {config.scheduler}"
        + (f", --lr scaled by the batch size ({config.lr_scale})" if config.lr_scale != "none" else "")
        + (f", ema {config.ema_decay:g}" if config.ema_decay else "")
        + (f", swa from epoch {config.swa_start_epoch + 1} on" if config.swa_start_epoch is not None else "")
        + (f", layer decay {config.layer_decay:g}" if config.layer_decay != 1 else "")
        + (f"; the head alone for {config.freeze_epochs} epoch(s)" if config.freeze_epochs else "")
    )
    unseen = " (no GPU is visible)" if trainer.device.type == "cpu" and not is_on("ACCELERATE_USE_CPU") else ""
    machine = (
        f"{device_name(trainer.device)}{unseen}, precision {accelerator.mixed_precision}, "
        f"{trainer.state.cpu_threads} thread(s)" + (", the model sharded by FSDP2" if trainer.sharded else "")
    )
    taught = (
        f"taught by {config.teacher}: {config.distill_weight:g} of the loss at temperature "
        f"{config.distill_temperature:g}"
    )
    print(f"{'run':<10}{trainer.run.path}")  # to be copied
    for head, text in [
        ("model", f"{titled(config)}: {summarize(model, *at, found)}"),
        *(("", line) for line in trainer.plain_model.origin),
        ("data", f"{data.name}: {sizes}; {data.kind}"),
        ("", f"{data.info.channels}x{data.image_size}x{data.image_size} pixels, augment {config.augment}"),
        *(("", line) for line in sampling_lines(config, data)),
        ("training", training),
        *(("", line) for line in lines_of_the_cut(trainer)),
        ("", optimizing),
        *([("", taught)] if config.teacher is not None else []),
        ("machine", machine),
        *(("note", line) for line in lines),
    ]:
        print(wrapped(head, text))
    print(flush=True)


def sizes_at_once(trainer: BaseTrainer, processes: int) -> list[int]:
    return parts(trainer.batch_size, processes, trainer.config.micro_batch_size)


def cut(trainer: BaseTrainer, processes: int) -> str:
    """A batch as processes and micro-batches: 2 process(es) x 3 x 8, or x (18 + 15)."""
    sizes = sizes_at_once(trainer, processes)
    of_one = sizes[: len(sizes) // processes]
    even = f"{len(of_one)} x {of_one[0]}"
    return f"{processes} process(es) x " + (even if len({*of_one}) == 1 else f"({' + '.join(map(str, of_one))})")


def lines_of_the_cut(trainer: BaseTrainer) -> list[str]:
    """What is said where the cut of a batch changes what a model learns."""
    named = made_of_what_is_computed_at_once(trainer.plain_model)
    if not named:
        return []
    before, number, step = trainer.state.processes, trainer.processes.number, trainer.state.step
    sizes = sizes_that_matter(trainer, number)
    shown = " and ".join(map(str, dict.fromkeys(sizes)))
    lines = [f"{named}: the {shown} images computed at once are part of the result"]
    if step and before is not None and sizes_that_matter(trainer, before) != sizes:
        lines.append(f"this changes here: until step {step:,} it was {cut(trainer, before)}")
    return lines


def sizes_that_matter(trainer: BaseTrainer, processes: int) -> list[int]:
    """Of what BatchNorm and dropout see at once."""
    together = processes if trainer.config.sync_batch_norm else 1
    return [together * size for size in sizes_at_once(trainer, processes)]


def made_of_what_is_computed_at_once(model: nn.Module) -> str:
    """What in the model makes its result depend on --micro_batch_size, though not on the number of processes."""
    batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    dropout = any(isinstance(module, (_DropoutNd, StochasticDepth)) and module.p for module in model.modules())
    loss = not getattr(model, "loss_is_mean_over_samples", True)
    return " and ".join(["the loss"] * loss + ["BatchNorm"] * batch_norm + ["dropout"] * dropout)


def left_out_each_epoch(train_loader: Any, batch_size: int) -> int:
    order = train_loader.order
    return order.samples.size % batch_size if isinstance(order, TrainOrder) else 0


def sampling_lines(config: Config, data: Data) -> list[str]:
    """How a stream is read, or how often classes come where that is not as they are."""
    split = data.train
    if isinstance(split.source, Stream):
        stream = split.source
        rows = len(stream) * stream.open_blocks // stream.reader.block_count
        return [f"streamed: {stream.reader.block_count:,} blocks, about {rows:,} rows shuffled at a time"]
    if isinstance(split.source, SequentialStream):
        return [f"streamed from the front: {config.shuffle_buffer:,} rows shuffled at a time"]
    lines = []
    counts_C = data.kind.counts(split.labels)
    if config.sampling != "uniform":
        weights = repeats(split.labels, len(data.classes), config.sampling)
        seen_C = effective_counts(split.labels, weights, len(data.classes))
        few, many = int(np.where(counts_C, counts_C, counts_C.max()).argmin()), int(counts_C.argmax())
        each = [f"{data.classes[c]} {counts_C[c]:,} come {seen_C[c]:,.0f} times" for c in (few, many)]
        lines.append(f"{config.sampling}: {', '.join(each)} an epoch of {weights.sum():,.0f}")
    if config.augment_rare != "none":
        rare = [data.classes[c] for c in np.flatnonzero(rare_classes(split.labels, len(data.classes)))]
        names = ", ".join(rare[:5]) + (", ..." if len(rare) > 5 else "")
        lines.append(f"{config.augment_rare} for {len(rare)} rare classes" + (f": {names}" if rare else ""))
    return lines


def print_result(trainer: BaseTrainer, result: dict) -> None:
    """The best epoch, the folder, and what to do next."""
    path, best = trainer.run.path, result["best"]
    print()
    if best:
        print(f"best      {best['metric']} {best['value']:.4f} in epoch {best['epoch'] + 1} (step {best['step']:,})")
    bad = len(trainer.bad_samples.lines)
    if bad:
        print(
            f"bad       {bad:,} samples could not be used and were replaced or left out: {path / 'bad_samples.jsonl'}"
        )
    print(f"run       {path}")
    if result["state"] == "preempted":
        print(f"stopped   after step {result['step']:,} ({result['reason']}), saved; continue with")
        print(f"          accelerate launch scripts/train.py --resume {path}")
        if trainer.processes.number > 1:
            print(f"          and the flags of the launcher, which started {trainer.processes.number} processes")
        return
    print("next      python scripts/test.py --weights " + str(path))
    print(f"          python scripts/predict.py --weights {path} IMAGE_OR_FOLDER")
    config = trainer.config
    longer = f"--max_steps {config.max_steps * 2}" if config.max_steps else f"--epochs {config.epochs * 2}"
    print(f"          python scripts/train.py --resume {path} {longer}")
