"""What is best, when patience ends, and when plateau lowers the learning rate: plain numbers in state.json."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import ConfigError, nearest
from configs.options import Config

HIGHER_IS_BETTER = {
    "accuracy": True,
    "top5_accuracy": True,
    "f1": True,
    "map": True,
    "r2": True,
    "mae": False,
    "rmse": False,
    "map50": True,
    "map75": True,
    "recall_at_1": True,
    "recall_at_5": True,
    "recall_at_10": True,
    "image_to_text_recall_at_1": True,
    "image_to_text_recall_at_5": True,
    "image_to_text_recall_at_10": True,
    "loss": False,
}


def higher_is_better(config: Config) -> bool:
    """From --monitor_mode, else from the table; parts of a loss (loss/<name>) are better when lower."""
    assert config.monitor is not None, "a trainer has set it"
    if config.monitor_mode:
        return config.monitor_mode == "max"
    if config.monitor.startswith("loss/"):
        return False
    metric = config.monitor.rpartition("/")[2]  # of one of several tasks, as in digit/accuracy
    if metric not in HIGHER_IS_BETTER:
        raise ConfigError(
            f"--monitor {config.monitor}: is less or more of it better?",
            fix=f"add --monitor_mode min or max; or {nearest(config.monitor, list(HIGHER_IS_BETTER))}",
        )
    return HIGHER_IS_BETTER[metric]


def check_monitor(config: Config, val_names: list[str]) -> None:
    """Refuse a metric that no validation will give, before the first step."""
    assert config.monitor is not None, "a trainer has set it"
    if config.monitor not in val_names:
        raise ConfigError(f"--monitor {config.monitor} is no validation metric", fix=nearest(config.monitor, val_names))
    higher_is_better(config)


@dataclass
class Progress:
    """The best value so far and the evaluations since."""

    best: float | None = None
    best_step: int = 0
    best_epoch: int = 0
    bad_evaluations: int = 0

    def update(self, value: float, *, higher: bool, min_delta: float, step: int, epoch: int) -> bool:
        """Note one evaluation; True where it is the best by more than min_delta."""
        gain = 0.0 if self.best is None else (value - self.best if higher else self.best - value)
        if self.best is not None and gain <= min_delta:
            self.bad_evaluations += 1
            return False
        self.best, self.best_step, self.best_epoch, self.bad_evaluations = value, step, epoch, 0
        return True
