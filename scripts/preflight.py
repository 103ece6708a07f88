"""`train.py --check`: all that a long run needs, tried out in seconds and without a trace.

A trial run in a temporary folder beside the real one does a few steps, an evaluation batch, a save and a load. The
run folder itself is neither made nor changed, and no tracker is started.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from configs.errors import UserError
from configs.options import Config
from data.dataset import Data
from data.order import even_parts
from scripts import logins
from scripts.audit import classes_found, pictures_found
from scripts.columns import COLUMNS
from scripts.report import met_by_all, told
from scripts.wiring import build_model, build_trainer
from trainer import checkpoint, freezing, micro_batch, run_folder, saving, signals, starting, swa
from trainer.base_trainer import BaseTrainer
from trainer.device import make_accelerator
from trainer.sharding import part
from trainer.windows import as_dict, samples_in

FOUND = ("task", "labels", "model", "monitor", "micro_batch_size")  # what follows from the data and the machine
STEPS, STEPS_SECONDS = 4, 20.0  # the first step warms up; the others tell the speed
OFF: dict[str, Any] = {
    "experiment_name": "check", "resume": "auto", "fresh": False, "check": False, "nonfinite": "stop",
    "stop_after_steps": STEPS, "save_every_steps": None, "save_every_minutes": None, "trace_samples": False,
    "use_tensorboard": False, "use_wandb": False, "push_to_hub": False,
}  # fmt: skip


def check(config: Config) -> int:
    """Try out what the run of this config needs, a line each; exit code 0, or 1 where something would fail."""
    with signals.at_once():  # the temporary folder is all there is to clear up
        accelerator = make_accelerator(config)
        config = replace(config, mixed_precision=accelerator.mixed_precision)  # as build_trainer will
        report = Report(accelerator.num_processes, shown=accelerator.is_main_process)
        with scratch_folder(run_folder.find(config).parent, accelerator) as folder:
            if config.auto_micro_batch and (known := micro_batch.recorded(config)):
                config = replace(config, micro_batch_size=known, auto_micro_batch=False)
            trial = replace(config, output_dir=str(folder), **OFF)
            trainer, data, notes = build_trainer(trial, timed)
            found = {name: getattr(trainer.config, name) for name in FOUND}
            config = replace(config, **found, auto_micro_batch=False)
            trainer.state.epoch = epoch_of_the_largest_batch(trainer)
            if trainer.plain_model.frozen and config.freeze_epochs * trainer.steps_per_epoch < trainer.total_steps:
                freezing.thaw(trainer)  # the whole model takes more time and memory than its head
            left: int | None = None  # steps
            if trainer.is_main:
                left = report.check("run folder", lambda: run_folder_found(config, trainer.total_steps, report))
                report.check("data", lambda: classes_found(data, notes, report.note))
            free_bytes = shutil.disk_usage(folder).free
            starting.open_run(trainer)
            seconds = report.check("step", lambda: step_found(trainer), together=True)
            if swa.has_statistics(trainer):
                report.check("averaging", lambda: statistics_found(trainer), together=True)
            report.check("evaluation", lambda: evaluation_found(trainer), together=True)
            saved = report.check("checkpoint", lambda: checkpoint_found(trainer, data), together=True)
            if trainer.is_main:
                if saved:
                    report.check("space", lambda: space_found(config, saved, free_bytes))
                report.check("pictures", lambda: pictures_found(config, data))
                for name, look in logins.wanted(config):
                    report.check(name, look)
                if seconds and left:
                    report.time(seconds, left)
            trainer.saver.close()
            trainer.run.close()
            (failed,) = broadcast_object_list([report.failed])
        if trainer.is_main:
            print(f"\n{failed} of {report.checks} checks failed" if failed else f"\nall {report.checks} checks passed")
        accelerator.end_training()
    return min(1, failed)


def epoch_of_the_largest_batch(trainer: BaseTrainer) -> int:
    first, later = trainer.batch_sizes
    return max([(first, 0), *((size, -epoch) for epoch, size in later)])[1] * -1


class Report:
    """A line for each check, from the main process; what went wrong with what to do."""

    def __init__(self, processes: int, *, shown: bool):
        self.processes, self.shown = processes, shown
        self.checks = self.failed = 0
        self.notes: list[str] = []

    def check(self, name: str, look: Callable[[], tuple[str, Any]], *, together: bool = False) -> Any:
        """Print what `look` found, or how it failed; what else it returned, None where it failed. together: all
        processes look."""
        self.checks += 1
        try:
            found, value = look()
        except Exception as error:
            if together and self.processes > 1 and not met_by_all(error):
                raise  # the others wait for this process, and the launcher has to end them
            fault = told(error)
            self.failed += 1
            self.line("FAIL", name, fault.what + (f" ({fault.where})" if fault.where else ""))
            if fault.fix:
                self.line("", "", f"fix: {fault.fix}")
            found, value = "", None
        if found:
            self.line("ok", name, found)
        for text in self.notes:
            self.line("note", "", text)
        self.notes = []
        return value

    def note(self, text: str) -> None:
        """To be told after the line of the check that is being made."""
        self.notes.append(text)

    def time(self, step_seconds: float, steps: int) -> None:
        self.line("note", "time", f"about {duration(step_seconds * steps)} for {steps:,} steps, without evaluations")

    def line(self, mark: str, name: str, text: str) -> None:
        if self.shown:
            head = f"{mark:<5} {name:<11} "
            print(*textwrap.wrap(text, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head),
                                 break_long_words=False, break_on_hyphens=False), sep="\n", flush=True)  # fmt: skip


@contextmanager
def scratch_folder(root: Path, accelerator: Accelerator) -> Iterator[Path]:
    """A hidden folder on the runs' filesystem, the same on all processes; it goes in every case, and with it the
    folders that had to be made for it."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()] if accelerator.is_main_process else []
    told: list[Any] = [None]
    try:
        if accelerator.is_main_process:
            try:
                with run_folder.RunFolder(root).telling():
                    root.mkdir(parents=True, exist_ok=True)
                    told = [Path(tempfile.mkdtemp(prefix=".check-", dir=root))]
            except UserError as error:
                told = [error]
        (told[0],) = broadcast_object_list(told)
        if isinstance(told[0], UserError):
            raise told[0]
        yield told[0]
    finally:
        if accelerator.is_main_process:
            if isinstance(told[0], Path):
                shutil.rmtree(told[0], ignore_errors=True)
            for folder in made:
                with suppress(OSError):  # another run is in it by now
                    folder.rmdir()


def timed(task: type[BaseTrainer]) -> type[BaseTrainer]:
    """The task's trainer, which notes when its steps end and stops where they take long."""

    class Timed(task):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self.ends: list[float] = []

        def after_step(self, bar: Any) -> bool:
            stops = super().after_step(bar)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.ends.append(time.perf_counter())
            return stops or self.processes.from_main(lambda: self.ends[-1] - self.begun > STEPS_SECONDS)

        def train_epoch(self, train_loader: Any) -> dict[str, float]:
            self.begun = time.perf_counter()
            return super().train_epoch(train_loader)

    return Timed


def run_folder_found(config: Config, total_steps: int, report: Report) -> tuple[str, int]:
    """What the run would find in its folder, which is only read; and the steps that are left."""
    path = run_folder.find(config)
    found, damaged = run_folder.find_checkpoint(config, path)
    changes = run_folder.check_same_run(config, path) if found else []
    for line in [*damaged, *changes]:
        report.note(line)
    if found is None:
        return f"{path} {'has no checkpoint: the run begins anew' if path.exists() else 'will be made'}", total_steps
    step = checkpoint.read_state(found)["step"]
    left = max(0, total_steps - step)
    return f"{path} {'will be continued' if left else 'is finished'} after step {step:,}", left


def step_found(trainer: Any) -> tuple[str, float]:
    """Whole global batches, all micro-batches; and the seconds of a step."""
    device, config = trainer.device, trainer.config
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    means = trainer.train_epoch(trainer.train_loader)
    ends = [trainer.begun, *trainer.ends]
    first, *others = [end - begin for begin, end in pairwise(ends)]
    seconds = statistics.median(others) if others else first
    micro = even_parts(trainer.batch_share, config.micro_batch_size)
    cut = f"{trainer.accelerator.num_processes} x {-(-trainer.batch_share // micro)} x {micro}"
    text = f"batch {trainer.batch_size} ({cut}): {seconds:.2g} s, the first {first:.2g} s, loss {means['loss']:.4g}"
    if device.type == "cuda":
        peak, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        text += f", peak memory {size(peak)} of {size(there)}"
    return text, seconds


def statistics_found(trainer: Any) -> tuple[str, None]:
    """SWA's pass for BatchNorm's statistics, one micro-batch of it."""
    begin = time.perf_counter()
    trainer.train_loader.set_position(trainer.state.epoch, 0)
    batches = list(islice(trainer.train_loader, 1))
    swa.measure_statistics(trainer, batches)
    samples = samples_in(as_dict(batches[0]))
    return f"BatchNorm's statistics on {samples} samples in {time.perf_counter() - begin:.2g} s", None


def evaluation_found(trainer: BaseTrainer) -> tuple[str, None]:
    if trainer.val_loader is None:
        return "there is no validation split: the training metrics decide what is best", None
    monitor, begin = trainer.monitor, time.perf_counter()
    batches = list(islice(trainer.val_loader, 1))
    metrics = trainer.validate_epoch(batches)
    seconds, samples = time.perf_counter() - begin, samples_in(as_dict(batches[0]))
    value = f"{metrics[monitor]:.4g}" if monitor in metrics else "is not told by these samples"
    return f"{samples} samples in {seconds:.2g} s, {monitor} {value}", None


def checkpoint_found(trainer: BaseTrainer, data: Data) -> tuple[str, dict[str, int]]:
    """Save, load into a second trainer, compare each bit; and the bytes of the files."""
    begin = time.perf_counter()
    trainer.save_checkpoint()
    trainer.saver.finish()
    seconds = time.perf_counter() - begin
    second = second_of(trainer, data)
    if second.resume_from is None:
        raise UserError("the checkpoint that was just saved is not found again", where=str(trainer.run.checkpoints))
    sizes = {path.name: path.stat().st_size for path in second.resume_from.iterdir()}
    saving.load_checkpoint(second, second.resume_from)
    if changed := gather_object(list(differences("", contents(trainer), contents(second)))):
        raise UserError(
            f"what is loaded is not what was saved: {', '.join(changed[:3])}",
            fix="look at the disk, and at what your own code keeps outside of the model and the optimizer",
        )
    total = sum(sizes.values())
    text = f"{size(total)} saved in {seconds:.2g} s, loaded again, equal to the bit"
    return text, sizes


def second_of(trainer: BaseTrainer, data: Data) -> BaseTrainer:
    """Another one of the same config, as a new process would make it."""
    model = build_model(trainer.config, data)
    try:
        return type(trainer)(trainer.config, model, trainer.train_loader, trainer.val_loader)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory does not hold the model twice, as comparing what is loaded with what was saved asks for",
            fix="begin the run without --check: it holds the model once",
        ) from error


def contents(trainer: BaseTrainer) -> dict[str, Any]:
    """All that a checkpoint has to bring back."""
    return {
        "model": trainer.plain_model.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "ema": trainer.ema.state_dict() if trainer.ema is not None else None,
        "scaler": trainer.scaler.state_dict() if trainer.scaler is not None else None,
        "state": trainer.state.to_json(),
    }


def differences(name: str, one: Any, other: Any) -> Iterator[str]:
    """The places where two nested values differ in a bit."""
    if type(one) is not type(other):
        yield name
    elif isinstance(one, dict):
        for key in one.keys() | other.keys():
            yield from differences(f"{name}.{key}".lstrip("."), one.get(key), other.get(key))
    elif isinstance(one, (list, tuple)) and len(one) == len(other):
        for place, pair in enumerate(zip(one, other)):
            yield from differences(f"{name}.{place}", *pair)
    elif isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        if not alike or not torch.equal(bits(one), bits(other)):
            yield name
    elif repr(one) != repr(other):
        yield name


def bits(tensor: Tensor) -> Tensor:
    return part(tensor).detach().cpu().reshape(-1).view(torch.uint8)


def space_found(config: Config, saved: dict[str, int], free_bytes: int) -> tuple[str, None]:
    """What the checkpoints that are kept, the one being written and best/ will take."""
    path, each = run_folder.find(config), sum(saved.values())
    count = config.keep_last + config.keep_best + 1
    there = [file for part in ("checkpoints", "best") for file in (path / part).rglob("*") if file.is_file()]
    needed = count * each + saved["model.safetensors"] - sum(file.stat().st_size for file in there)
    text = f"{count} checkpoints and best/ need {size(max(0, needed))}, {size(free_bytes)} are free"
    if needed > free_bytes:
        raise UserError(
            f"{text} in {path.parent}",
            fix="free some space, lower --keep_last or --keep_best, or choose another --output_dir",
        )
    return text, None


def size(bytes_: float) -> str:
    return f"{bytes_ / 1e9:,.1f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
