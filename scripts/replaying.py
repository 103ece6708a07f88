"""A step of a run, computed again in a temporary folder, and compared with what the run wrote of it."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.environment import int_of
from configs.errors import ConfigError, Diverged, UserError
from configs.options import Config
from scripts.columns import wrapped
from scripts.recording import Step, cut_as_by, recording
from scripts.wiring import build_trainer
from trainer import checkpoint, signals
from trainer.base_trainer import BaseTrainer
from trainer.metrics import means
from trainer.run_folder import RunFolder, saved_yaml, write_whole
from trainer.saving import name_of_non_finite

ROUNDING = 1e-5  # relative: what sums in another order may change within some steps


@dataclass
class Written:
    """What a run folder tells of a step."""

    environment: dict[str, Any]
    status: dict[str, Any]
    line: dict[str, Any] | None  # of metrics.jsonl: means since the line before
    window_start: int  # the step of that one
    ids: list[int] | None  # from samples.jsonl
    capsule: dict[str, Any] | None  # of a step that was not finite

    def stopped_at(self, number: int) -> bool:
        return self.status.get("state") == "diverged" and self.status["step"] == number


def replay(run: Path, number: int, config: Config, processes: int | None = None) -> int:
    """Show the step, and how it compares with what was written; exit code 0 where nothing differs."""
    if int_of("WORLD_SIZE") > 1:
        raise ConfigError("a replay is one process", fix="start it with python, without a launcher")
    run = run.resolve()
    written = read(run, number)
    processes = processes or processes_at(run, number) or written.environment.get("processes", 1)
    if config.sync_batch_norm and processes > 1:
        raise ConfigError("--sync_batch_norm computed over all processes at once, which a replay, being one, cannot")
    with tempfile.TemporaryDirectory(prefix="replay-", ignore_cleanup_errors=True) as folder, signals.at_once():
        begun = set_up(run, number, Path(folder) / "replay")
        print(f"replay    {run.name}: {f'from the checkpoint of step {begun}' if begun else 'from the beginning'}")
        trial = replace(
            config, output_dir=folder, experiment_name="replay", resume="auto", fresh=False,
            cpu_threads=config.cpu_threads or written.environment.get("cpu_threads"),
            stop_after_steps=number - begun, save_every_minutes=None, early_stopping=False, trace_samples=False,
            use_tensorboard=False, use_wandb=False, push_to_hub=False,
        )  # fmt: skip
        write_whole(Path(folder) / "replay" / "config.yaml", saved_yaml(trial))
        trainer, _, _ = build_trainer(trial, recording(number, written.window_start, processes))
        cut_as_by(trainer, processes)
        step, fault = run_to(trainer, number)
    show(number, step)
    if not fault and written.stopped_at(number) and (name := name_of_non_finite(trainer)):
        fault = f"{name} is not finite after step {number}"  # as a save would have found
    results = [*compared(written, number, step), *compared_fault(written, number, fault)]
    excuses = why_bits_may_differ(written.environment, trainer, processes)
    return tell(results, excuses)


def read(run: Path, number: int) -> Written:
    """Raises UserError where the run has no such step."""
    lines = list(json_lines(run / "metrics.jsonl"))
    samples = list(json_lines(run / "samples.jsonl"))
    status = RunFolder(run, writes=False).read_status()
    last = max(entry.get("step", 0) for entry in [status, *lines, *samples])
    if not 1 <= number <= last:
        raise UserError(
            f"the run has no step {number}",
            where=str(run),
            fix=f"give one from 1 to {last}" if last else "its first step is not done yet",
        )
    logged = {line["step"]: line for line in lines if line["kind"] == "train"}
    capsule, environment = run / "nonfinite" / f"step_{number:08d}.json", run / "env.json"
    return Written(
        environment=json.loads(environment.read_text()) if environment.is_file() else {},
        status=status,
        line=logged.get(number),
        window_start=max((step for step in logged if step < number), default=0),
        ids=next((entry["ids"] for entry in samples if entry["step"] == number), None),
        capsule=json.loads(capsule.read_text()) if capsule.is_file() else None,
    )


def processes_at(run: Path, number: int) -> int | None:
    """As the first checkpoint that is left from there on tells; a resume changes what env.json says."""
    folders = checkpoint.all_checkpoints(run / "checkpoints")
    later = (folder for folder in folders if (checkpoint.step_of(folder) or 0) >= number)
    intact = next((folder for folder in later if not checkpoint.fault(folder)), None)
    return checkpoint.read_state(intact).get("processes") if intact else None


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(text)
        except ValueError:  # the last line of a run that was killed, or that is writing it
            return


def set_up(run: Path, number: int, copy: Path) -> int:
    """A run folder with the newest intact checkpoint before the step, as links; its step, 0 where there is none."""
    (copy / "checkpoints").mkdir(parents=True)
    for folder in reversed(checkpoint.all_checkpoints(run / "checkpoints")):
        step = checkpoint.step_of(folder) or 0
        if step >= number:
            continue
        if wrong := checkpoint.fault(folder):
            print(f"note      checkpoint {folder.name} is damaged and passed over: {wrong}")
            continue
        (copy / "checkpoints" / folder.name).mkdir()
        for path in folder.iterdir():
            (copy / "checkpoints" / folder.name / path.name).symlink_to(path)
        return step
    return 0


def run_to(trainer: Any, number: int) -> tuple[Step, str]:
    """Train up to the step; and how it stopped, where it was not finite."""
    trainer.table.shown = False
    fault = ""
    with redirect_stdout(sys.stderr):  # what is said on the way is no result
        try:
            reason = trainer.train().get("reason", "")
            if reason in signals.REASONS:
                raise signals.Preempted(reason)
        except Diverged as error:
            fault = error.what
    if trainer.state.step != number:
        raise UserError(
            f"the replay ended at step {trainer.state.step}" + (f": {fault}" if fault else ""),
            fix="give the flags that the run had then, for example --epochs, --max_steps or --nonfinite",
        )
    return trainer.recorded, fault


def show(number: int, step: Step) -> None:
    print(f"step      {number} (epoch {step.epoch + 1})")
    for name, value in (*step.means().items(), ("grad_norm", step.grad_norm), ("lr", step.lr)):
        print(f"{name:<9} {value:.17g}")
    print(wrapped("samples", ", ".join(map(str, step.ids))))


Difference = tuple[str, Any, Any]


def compared(written: Written, number: int, step: Step) -> Iterator[tuple[str, list[Difference]]]:
    """What there is to compare with, and (name, then, now) of each value that differs in a bit."""
    if line := written.line:
        first = written.window_start + 1
        now: dict[str, Any] = {
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            **means({name: sums for name, sums in step.window.items() if name in step.losses}),
        }
        title = "metrics.jsonl" + (f", mean of steps {first} to {number}" if first < number else "")
        yield title, [(name, line[name], now[name]) for name in now if name in line and line[name] != now[name]]
    if written.ids is not None:
        yield "samples.jsonl", [("samples", written.ids, step.ids)] if written.ids != step.ids else []
    if capsule := written.capsule:
        losses = {name: [*map(repr, row)] for name, row in step.losses.items()}
        now = {"losses": losses, "lr": step.lr, "ids": step.ids}
        title = f"nonfinite/step_{number:08d}.json"
        yield title, [(name, capsule[name], now[name]) for name in now if capsule[name] != now[name]]


def compared_fault(written: Written, number: int, fault: str) -> Iterator[tuple[str, list[Difference]]]:
    """How the run stopped at this step, or the replay does."""
    reason = written.status.get("reason", "") if written.status.get("state") == "diverged" else ""
    same = bool(fault) and fault in reason
    if fault:
        print(wrapped("fault", fault + ("; the run stopped by it, too" if same else "")))
    if not same and (fault or written.stopped_at(number)):
        yield "status.json", [("fault", reason or None, fault or None)]


def why_bits_may_differ(environment: dict[str, Any], trainer: BaseTrainer, processes: int) -> list[str]:
    """What the machine or the number of processes changes in the last bits."""
    now = {"torch": torch.__version__, "device": trainer.device.type}
    then = {name: str(environment.get(name)).split(":")[0] for name in now}
    reasons = [f"{name} was {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]
    if processes > 2:
        reasons.append(f"{processes} processes added up in an order of their own")
    if environment.get("sharded"):
        reasons.append("the model was sharded: gradients were added up after each micro-batch")
    if trainer.device.type == "cuda" and not trainer.config.deterministic:
        reasons.append("the run was not --deterministic")
    return reasons


def tell(results: list[tuple[str, list[Difference]]], excuses: list[str]) -> int:
    """A line for each comparison; exit code 1 where one differs."""
    code = 0
    for title, differences in results:
        close = bool(excuses) and all(is_close(then, now) for _, then, now in differences)
        verdict = "equal but for rounding" if close else "DIFFERENT"
        print(f"compare   {title}: {verdict if differences else 'equal to the last bit'}")
        for name, then, now in differences:
            print(f"          {name} was {then!r}, now {now!r}")
        code = max(code, int(bool(differences) and not close))
    if any(differences for _, differences in results):
        then = "the run may have gone on with other flags since: give those of then, as --max_steps or --processes"
        print(*(f"note      {reason}" for reason in excuses or [then]), sep="\n")
    if not results:
        print("compare   the run wrote nothing of this step alone")
    return code


def is_close(then: Any, now: Any) -> bool:
    return isinstance(then, float) and isinstance(now, float) and math.isclose(then, now, rel_tol=ROUNDING)
