"""BaseTrainer: what every task shares. Read `train` and `optimize` first; the epoch's loop is in main_trainer.py.

Accelerator owns devices, precision, DDP/FSDP and the state it saves. The order of data, the window of an
optimizer step, the seeds and the run folder are ours.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import ConfigError, DataError, Diverged, UserError, is_of_another_process
from configs.options import Config
from data.batch_sizes import BatchSizes, check_shares
from data.order import Use, mix, seed_device
from trainer import freezing, reporting, run_folder, saving, sharding, signals, starting, swa
from trainer.bad_samples import BadSamples, ReportingLoader
from trainer.batch_statistics import BatchStatistics
from trainer.ddp import ddp_options, settle_buckets, with_synced_norms
from trainer.device import make_accelerator, moved_ahead, set_algorithms
from trainer.losses import Criterion, Losses, loss_names, total
from trainer.metrics import CURE, Meter
from trainer.monitor import check_monitor, higher_is_better
from trainer.nonfinite import NonFinite
from trainer.optim import build_optimizers, clip_gradients, lr_factor, peak_lr, swa_lr
from trainer.processes import Processes, precise
from trainer.progress import Clock, EpochBar, Table
from trainer.state import TrainState
from trainer.task import Task
from trainer.trackers import FINISH_SECONDS, STOPPED_SECONDS, Tracker
from trainer.windows import NO_WINDOW, Batch, EpochLengths, PositionedLoader, Window, as_dict, grouped, samples_in


class BaseTrainer(Task):
    """Trains a model as a config says. A task writes what trainer/task.py says, or inherits it from MainTrainer.

    model: a models.BaseModel. Loaders: any iterable of batches; a batch is a dict (images_BCHW, labels, ...) or
    an (images, labels) pair.
    """

    def __init__(
        self,
        config: Config,
        model: Any,
        train_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
        *,
        accelerator: Accelerator | None = None,
    ):
        self.accelerator = accelerator or make_accelerator(config)
        self.monitor = config.monitor or self.usual_monitor(model)
        config = replace(config, monitor=self.monitor)
        self.config, self.train_loader, self.val_loader = config, train_loader, val_loader
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.processes = Processes(self.accelerator)
        self.reduce = self.processes.reduce
        self.batch_sizes = BatchSizes.of(config)
        if train_loader is not None:
            check_shares(self.batch_sizes, self.processes.number)

        from_main = self.processes.from_main
        self.run = run_folder.RunFolder(from_main(lambda: run_folder.find(config)), writes=self.is_main)
        self.resume_from, self.messages = from_main(lambda: starting.find_checkpoint(self))
        self.state = TrainState(wandb_id=from_main(lambda: uuid4().hex[:12]))
        if self.resume_from:
            self.state = starting.read_state(self, self.resume_from)
        set_algorithms(config)
        starting.set_threads(self)

        if config.sync_batch_norm:
            model = with_synced_norms(model, self.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.sharded = self.accelerator.is_fsdp2
        self.plain_model = model if self.sharded else model.to(self.device)  # FSDP moves part by part
        self.optimizers = build_optimizers(self.plain_model, config, sharded=self.sharded)
        freezing.freeze(self)
        if self.accelerator.ddp_handler is None:
            self.accelerator.ddp_handler = ddp_options(config, self.plain_model)
        if self.sharded:
            sharding.check_blocks(self.plain_model, self.accelerator)
        self.model, *_ = self.accelerator.prepare(self.plain_model, *self.optimizers)
        settle_buckets(self.model)
        if self.sharded:
            sharding.compute_in_precision(self.plain_model, self.accelerator)
        if config.compile:
            if self.sharded:
                sharding.let_blocks_be_compiled()
            self.plain_model.compile()  # in place: names in the state dict stay as they are
        self.parameters = [p for p in self.plain_model.parameters() if p.requires_grad]
        self.ema = swa.averaged_weights(config, self.plain_model, self.state)  # moving, or of epochs
        self.scaler = self.accelerator.scaler

        self.criterion: Criterion = self.get_criterion()
        self.bad_samples = BadSamples(self.run, config.max_bad_fraction, self.processes.gather_lines)
        self.meter = Meter(self.hits, self.processes.told_by_all, finite_only=config.nonfinite != "stop")
        self.nonfinite = NonFinite(self)
        self.batch_statistics = BatchStatistics(self.plain_model, self.reduce)
        self.saver = saving.Saver(self)
        self.window = NO_WINDOW
        self.lr = 0.0
        self.grad_norm: Tensor | None = None
        self.clock = Clock()
        self.forward_flops: tuple[float, float] | None = None  # of one sample, see trainer/mfu.py; a script sets it
        self.session_steps = 0
        self.epoch_lengths = EpochLengths(train_loader, self.batch_sizes, self.processes.number, config.max_steps)
        self.total_steps = config.max_steps or self.epoch_lengths.total(config.epochs)
        self.exhausted = False  # the loader has given all of its epoch
        starting.check_lengths(self)
        self.trackers: list[Tracker] = []
        self.table = Table(self.monitor, shown=self.is_main)

    # ---- the run ------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end of the config, or to a stop; what status.json says of it."""
        if self.train_loader is None:
            raise DataError(
                "there is no train_loader to train on", fix="Trainer(config, model, train_loader, val_loader)"
            )
        parts = [f"loss/{name}" for name in loss_names(self.criterion)]
        check_monitor(
            self.config, [*(self.val_metric_names() if self.val_loader is not None else ["loss", "accuracy"]), *parts]
        )
        if self.is_main:
            print(*self.messages, sep="\n", end="\n" if self.messages else "")
        with signals.noted(can_save=True):
            return self.train_until_stopped()

    def train_until_stopped(self) -> dict[str, Any]:
        starting.load_checkpoint(self)
        if self.finished:
            return self.already_done()
        starting.open_run(self)
        patience = STOPPED_SECONDS
        try:
            result = self.leave(*self.train_epochs())
            patience = STOPPED_SECONDS if result["reason"] in signals.REASONS else FINISH_SECONDS
            return result
        except BaseException as error:
            state = "diverged" if isinstance(error, Diverged) else "failed"
            of_another = is_of_another_process(error)
            reason = "another process has ended" if of_another else str(error)[:1000]
            with suppress(UserError):  # a full disk must not hide what is being told
                self.run.status(state, **reporting.standing(self), reason=reason or type(error).__name__)
            if not (of_another or isinstance(error, UserError)):  # a device that waits for another would not answer
                error.add_note(reporting.where_it_is(self))
            raise
        finally:
            self.saver.close()
            for tracker in self.trackers:
                tracker.finish(self.run.best, seconds=patience)
            self.run.close()

    def train_epochs(self) -> tuple[str, str]:
        """Train and evaluate until the end or a stop; which of them it was, and why."""
        assert self.train_loader is not None
        try:
            if self.config.nonfinite == "rollback" and not self.state.step:
                self.save_checkpoint()  # to go back to
            while not self.finished:
                freezing.thaw_when_due(self)
                results = {"train": self.train_epoch(self.train_loader)}
                self.clock.stop()
                if self.stop_is_due() and not self.epoch_is_complete():
                    return "preempted", "stop_after_steps"
                swa.average_epoch(self)
                if self.val_loader is not None:
                    results["val"] = self.validate_epoch(self.val_loader)
                    self.bad_samples.collect("val", self.val_loader, self.state.step)
                self.finish_epoch(results)
                if self.stop_is_due() and not self.finished:
                    return "preempted", "stop_after_steps"
        except signals.Preempted as stop:
            return "preempted", stop.reason
        return "done", ""

    @property
    def batch_size(self) -> int:
        """Of all processes together, in this epoch."""
        return self.batch_sizes.at(self.state.epoch)

    @property
    def batch_share(self) -> int:
        return self.batch_size // self.processes.number

    @property
    def steps_per_epoch(self) -> int:
        return self.epoch_lengths.of(self.state.epoch)

    @property
    def finished(self) -> bool:
        out_of_patience = self.config.early_stopping and self.state.monitor.bad_evaluations >= self.config.patience
        state = self.state
        return (state.step >= self.total_steps and state.evaluated_step == state.step) or out_of_patience

    def epoch_is_complete(self) -> bool:
        return self.exhausted or self.state.step_in_epoch >= self.steps_per_epoch or self.state.step >= self.total_steps

    def stop_is_due(self) -> bool:
        limit = self.config.stop_after_steps
        return limit is not None and self.session_steps >= limit

    def finish_epoch(self, results: dict[str, dict[str, float]]) -> None:
        """After an evaluation: write it down, decide what is best, and save."""
        state, config = self.state, self.config
        judged = results.get("val", results["train"])
        if self.monitor not in judged:
            raise ConfigError(f"--monitor {self.monitor} is none of {', '.join(judged)}")
        value, higher = judged[self.monitor], higher_is_better(config)
        place = {"step": state.step, "epoch": state.epoch}
        is_best = state.monitor.update(value, higher=higher, min_delta=config.min_delta, **place)
        if config.scheduler == "plateau":
            state.plateau.update(value, higher=higher, min_delta=config.min_delta, **place)
            if state.plateau.bad_evaluations >= config.decay_epochs:
                state.plateau_factor *= config.decay_factor
                state.plateau.bad_evaluations = 0
        self.log_metrics(results)
        self.table.line(state.epoch, results, self.clock.speed(), best=is_best)
        if is_best:
            saving.save_best(self, judged)
        ranked = sorted([*state.best_steps, (value, state.step)], key=lambda e: (-e[0] if higher else e[0], e[1]))
        state.best_steps = ranked[: config.keep_best]
        if self.exhausted or state.step_in_epoch >= self.steps_per_epoch:
            state.epoch, state.step_in_epoch, state.epoch_sums = state.epoch + 1, 0, {}
        state.evaluated_step = state.step
        self.save_checkpoint()

    def log_metrics(self, results: dict[str, dict[str, float]]) -> None:
        """An evaluation's lines: the epoch's training means, the validation, the speed."""
        place = {"step": self.state.step, "epoch": self.state.epoch}
        self.run.log("epoch", {**place, **results["train"]})
        if "val" in results:
            self.run.log("val", {**place, **results["val"]})
        reporting.log_speed(self)
        flat = {f"{part}/{name}": value for part, values in results.items() for name, value in values.items()}
        reporting.track(self, {name.replace("train/", "epoch/", 1): value for name, value in flat.items()})

    def leave(self, state: str, reason: str) -> dict[str, Any]:
        self.processes.hear()  # nothing may be on its way when processes part
        self.save_checkpoint(regular=False)
        self.saver.finish()
        result = {"state": state, **reporting.standing(self), "reason": reason}
        self.run.status(**result)
        self.processes.wait()  # a launcher ends all processes as soon as one has ended
        return result

    def already_done(self) -> dict[str, Any]:
        """A finished run's result. One killed after its last save has not yet said so, nor removed old checkpoints."""
        result = {"state": "done", **reporting.standing(self), "reason": ""}
        if self.run.locked and self.run.read_status() != result:
            self.saver.prune(self.state.to_json())
            self.run.status(**result)
        return result

    # ---- under the loop: windows, one step, what is logged ------------------------------------------------

    def windows(self, train_loader: Iterable[Any]) -> Iterator[Window]:
        """Group micro-batches into optimizer steps of batch_size / processes samples; the last may have fewer."""
        done, self.exhausted = self.state.step_in_epoch, False
        if self.state.step >= self.total_steps:  # stopped in the last evaluation, which is still to be done
            return
        if isinstance(train_loader, PositionedLoader):
            train_loader.set_position(self.state.epoch, done)
            done = 0
        loaded = self.bad_samples.attached(train_loader, self.clock.waiting(train_loader))
        ahead = moved_ahead(loaded, self.device, self.on_device)
        groups: Iterator[list[Batch]] = itertools.islice(grouped(ahead, self.batch_share), done, None)
        if self.reduce is not None and not isinstance(train_loader, PositionedLoader):
            groups = self.processes.in_step(groups, self.equal_on_all)
        for batches in groups:
            self.bad_samples.detach(batches, self.state.step + 1)
            counts = [self.counted(batch) for batch in batches]
            self.clock.samples += sum(map(samples_in, batches)) * self.processes.number
            yield Window(batches, counts, self.window_total(counts, train_loader))
            self.window = NO_WINDOW
        self.exhausted = True
        if not self.state.step_in_epoch:
            raise DataError(
                f"the train_loader gave no batch in epoch {self.state.epoch + 1}",
                fix="a generator gives its batches once: pass a list or a loader, or a lower --max_steps",
            )

    @property
    def computes_in_step(self) -> bool:
        """Whether a forward pass waits for that of the other processes: for parts of weights, buffers or statistics."""
        return self.sharded or self.config.sync_batch_norm or getattr(self.model, "broadcast_buffers", False)

    def equal_on_all(self, batches: list[Batch]) -> list[int]:
        """What the windows of all processes must have in common: their micro-batches where they compute in step; and
        of these, if a loss needs it, the sizes."""
        return [1] * len(batches) if self.computes_in_step else [1]

    def counted(self, batch: Batch) -> Any:
        """A batch that only keeps processes in step counts for nothing."""
        return 0 if "valid" in batch else self.count(batch)

    def window_total(self, counts: list[Any], loader: Iterable[Any]) -> Any:
        """The count of the window over all processes; known without asking where an order made it."""
        mine = sum(counts)
        if self.reduce is None:
            return mine
        if isinstance(loader, PositionedLoader) and type(self).count is Task.count:
            return self.batch_size
        if isinstance(mine, Tensor):
            return self.reduce(mine.to(self.device, precise(self.device)))
        return self.reduce(torch.full((), mine, dtype=precise(self.device), device=self.device))  # a copy would wait

    def micro_batches(self, window: Window) -> Iterator[Batch]:
        """Each micro-batch on the device, with the generators seeded by its place, ready for `optimize`."""
        self.window = window
        self.nonfinite.begin_step()
        self.batch_statistics.begin_step(window)
        offset = self.accelerator.process_index * self.batch_share
        for number, batch in enumerate(window.batches):
            window.number = number
            batch["offset"] = offset
            offset += samples_in(batch)
            seed_device(mix(self.config.seed, Use.STEP, self.state.step, batch["offset"]), self.device)
            if window.is_last or self.sharded:  # FSDP would keep whole gradients until they meet
                yield batch
            else:
                with self.accelerator.no_sync(self.model):  # gradients meet in the last micro-batch
                    yield batch

    def on_device(self, item: Any) -> Batch:
        batch = as_dict(item)
        if self.device.type == "cpu" and not self.config.channels_last:
            return batch
        moved = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        if self.config.channels_last:
            moved["images_BCHW"] = moved["images_BCHW"].to(memory_format=torch.channels_last)
        return moved

    def optimize(self, losses: Losses) -> None:
        """Backward; after the last micro-batch of the window also clip, step, average and count."""
        loss, window, config, state = total(losses), self.window, self.config, self.state
        if len(window.batches) > 1 or self.reduce is not None:  # a mean over part of the window weighs by its part
            loss = loss * window.share(self.processes.number, loss.dtype)
        loss = self.nonfinite.looked_at(loss)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.batch_statistics.after_micro_batch(window)
        if not window.is_last:
            return
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        self.grad_norm = clip_gradients(self.parameters, config.grad_clip)
        self.lr = swa_lr(config, self.batch_size, state.epoch) or peak_lr(config, self.batch_size) * self.lr_factor()
        if self.nonfinite.allows_update(self.grad_norm):
            # the optimizers themselves: Accelerate's wrappers look for an optional package at every step, 139 us
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * group.get("lr_factor", 1.0)
                optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        for parameter in self.parameters:
            parameter.grad = None
        state.step += 1
        state.step_in_epoch += 1
        self.session_steps += 1
        if self.ema is not None:
            self.ema.update(state.step)

    def lr_factor(self) -> float:
        if self.config.scheduler == "plateau" and self.state.step >= self.config.warmup_steps:
            return self.state.plateau_factor
        epoch = self.state.epoch + self.state.step_in_epoch / self.steps_per_epoch
        return lr_factor(self.state.step, self.config, total_steps=self.total_steps, epoch=epoch)

    def after_step(self, bar: EpochBar) -> bool:
        """A step's log line and checkpoint where they are due; True where training stops here."""
        state, config = self.state, self.config
        stops = self.stop_is_due() or state.step >= self.total_steps
        at_end = state.step_in_epoch >= self.steps_per_epoch or stops  # then the save waits for the evaluation
        logs = state.step % config.log_every == 0 or state.step == 1
        saves = config.save_every_steps is not None and state.step % config.save_every_steps == 0
        bar.step()
        if config.trace_samples:
            reporting.trace_samples(self)
        if self.nonfinite.looks_at_once or logs or saves or at_end:
            self.nonfinite.settle()
        if logs:
            reporting.log_step(self, bar)
        if saves:
            state.regular_step = state.step  # whoever saves this step
        if (self.poll() or saves) and not at_end:
            self.save_checkpoint(regular=saves)
        return stops

    def poll(self) -> bool:
        """Hear what other processes want; True where --save_every_minutes asks for a save.

        Raises Preempted on all processes at the same step, and UserError where a checkpoint could not be written.
        """
        minutes, reason = self.config.save_every_minutes, signals.stop_reason()
        due = minutes is not None and self.is_main and time.monotonic() - self.saver.last_save >= 60 * minutes
        stop = signals.REASONS.index(reason) + 1 if reason else 0
        stop, save, failed = self.processes.exchange(stop, int(due), int(self.saver.failed))
        if failed:
            self.saver.finish()
        if stop:
            raise signals.Preempted(signals.REASONS[stop - 1])
        return bool(save)

    def polled(self, val_loader: Iterable[Any]) -> Iterable[Any]:
        """An evaluation can be stopped, too: it is done anew when the run goes on. Loaders of this project alone
        have as many batches on each process, so that all hear the same."""
        if self.reduce is not None and not isinstance(val_loader, ReportingLoader):
            yield from self.processes.in_step(val_loader) if self.computes_in_step else val_loader
            return
        for batch in val_loader:
            self.poll()
            yield batch

    # ---- saving and coming back ---------------------------------------------------------------------------

    def averaged(self) -> AbstractContextManager[None]:
        """The model computes with its averaged weights inside this block, where there are such."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def save_checkpoint(self, *, regular: bool = True) -> None:
        """Save where the run stands. regular: because the config says so, not a clock or a signal."""
        self.nonfinite.settle()
        self.meter.read(self.state.window_sums, self.state.epoch_sums)  # raises Diverged on a loss of NaN
        name = saving.name_of_non_finite(self)
        if names := self.processes.gather_lines([name] if name else []):
            raise Diverged(f"{names[0]} is not finite after step {self.state.step}", fix=CURE)
        reporting.share_bad_samples(self)
        if regular:
            self.state.regular_step = self.state.step
        self.saver.save()
        self.run.status("running", **reporting.standing(self))

    def roll_back(self) -> int:
        """Go back to the weights of the last regular checkpoint, and forward over the data since; their step."""
        step = self.state.regular_step
        saving.roll_back(self, step)
        self.save_checkpoint()
        return step
