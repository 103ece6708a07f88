"""Where a run stands: plain numbers, saved as state.json. Order and randomness follow from them and the config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.metrics import Sums
from trainer.monitor import Progress


@dataclass
class TrainState:
    step: int = 0  # optimizer updates done in the run
    epoch: int = 0  # epochs done
    step_in_epoch: int = 0
    evaluated_step: int = 0  # of the last evaluation that is written down
    epoch_sums: Sums = field(default_factory=dict)  # since the epoch began
    window_sums: Sums = field(default_factory=dict)  # since the last log line
    monitor: Progress = field(default_factory=Progress)
    plateau: Progress = field(default_factory=Progress)
    plateau_factor: float = 1.0
    averaged_epochs: int = 0  # whose weights are in the mean of SWA
    best_steps: list[tuple[float, int]] = field(default_factory=list)  # (value, step) of the best checkpoints
    nonfinite_steps: int = 0  # skipped, or gone back from
    teacher: str = ""  # sha256 of the model that is distilled
    train_samples: int | None = None  # that the order is a permutation of
    regular_step: int = 0  # of the last save that only the config decided on
    cpu_threads: int = 1
    processes: int | None = None  # that computed what led here
    wandb_id: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        progress = {name: Progress(**values[name]) for name in ("monitor", "plateau")}
        best_steps = [(value, step) for value, step in values["best_steps"]]
        return cls(**(values | progress | {"best_steps": best_steps}))
