"""What a task writes: its criterion, its passes, its metrics. The run around them is in base_trainer.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from configs.errors import UserError
from trainer.losses import Criterion, Losses, Weights
from trainer.windows import Batch, samples_in


class Task(ABC):
    """Five abstract methods, which MainTrainer has for classification; what is below them fits most tasks as it is.

    kinds: what the labels may be, names of data/kinds.py. default_model, default_monitor: where the config names none.
    usage: how a loaded model is called with images.
    """

    kinds: tuple[str, ...] = ("classes",)
    default_model = "simple_cnn"
    default_monitor = "accuracy"
    usage = "logits = model(images)"  # for the card of a saved model
    loss_weights: Weights = None  # get_criterion may set them

    @abstractmethod
    def get_criterion(self) -> Criterion:
        """One loss, or a tuple, list or dict of them; `self.loss_weights` may weigh them."""

    @abstractmethod
    def forward_pass(self, batch: Batch) -> tuple[Losses, Any]:
        """The mean loss over `count(batch)`, and the predictions."""

    @abstractmethod
    def train_epoch(self, train_loader: Iterable[Any]) -> dict[str, float]:
        """Train on what is left of the epoch; the means of the whole of it."""

    @abstractmethod
    def validate_epoch(self, val_loader: Iterable[Any]) -> dict[str, float]:
        """Metrics over every sample once."""

    @abstractmethod
    def inference(self, inputs: Tensor) -> Any:
        """Predictions for a batch of inputs."""

    def as_rows(self, predictions: Any) -> list[dict[str, Any]]:
        """What scripts/predict.py writes of each sample of `inference`'s predictions."""
        raise UserError(f"{type(self).__name__} does not tell how its predictions are written", fix="write as_rows")

    def count(self, batch: Batch) -> Any:
        """What a mean loss is a mean over: samples. Masked or weighted losses count something else, a number or a
        tensor; the loss of a batch that counts 0 has to be finite."""
        return samples_in(batch)

    def kept(self, predictions: Any, batch: Batch) -> tuple[Tensor, ...]:
        """What `hits` needs of each sample, tensors [B, ...]; kept on the device until the next log line."""
        return ()

    def hits(self, *kept: Any) -> dict[str, Tensor]:
        """Training metrics of many steps at once: bool [N] by name."""
        return {}

    @classmethod
    def usual_monitor(cls, model: Any) -> str:
        """What decides where --monitor does not."""
        return cls.default_monitor

    def val_metric_names(self) -> list[str]:
        """The keys that `validate_epoch` will return, for --monitor."""
        return ["loss"]
