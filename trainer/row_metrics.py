"""Metrics of all predictions at once: those of every sample are kept and gathered, exact on any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.processes import Processes, precise
from trainer.windows import Batch


class RowMetrics:
    """compute: from outputs and labels, float [N, K] each, to the metrics. Without any sample there are none."""

    def __init__(self, compute: Callable[[Tensor, Tensor], dict[str, float]], columns: int, device: torch.device):
        self.compute_of, self.columns = compute, columns
        self.rows = [torch.zeros(0, 2 * columns, dtype=precise(device), device=device)]

    def update(self, predictions: Tensor, batch: Batch) -> None:
        """predictions [B, K], labels [B] or [B, K]."""
        labels_BK = batch["labels"].reshape(len(predictions), self.columns)
        self.rows.append(torch.cat([predictions.to(self.rows[0].dtype), labels_BK.to(self.rows[0].dtype)], 1))

    def compute(self, processes: Processes | None = None) -> dict[str, float]:
        rows = torch.cat(self.rows)
        rows = (processes.gather_rows(rows) if processes is not None else rows).cpu().double()
        return self.compute_of(rows[:, : self.columns], rows[:, self.columns :]) if len(rows) else {}


def multi_label_metrics(logits_NC: Tensor, labels_NC: Tensor) -> dict[str, float]:
    """map: the mean over classes of average precision; f1: the mean over classes; accuracy: samples that are right in
    every class. Classes that neither occur nor are predicted do not count."""
    predicted_NC, true_NC = logits_NC > 0, labels_NC > 0
    hits_C = (predicted_NC & true_NC).sum(0).double()
    both_C = (predicted_NC.sum(0) + true_NC.sum(0)).double()
    precisions = [average_precision(logits_NC[:, c], true_NC[:, c]) for c in range(true_NC.shape[1])]
    known = [precision for precision in precisions if precision is not None]
    return {
        "map": sum(known) / max(1, len(known)),
        "f1": float((2 * hits_C / both_C.clamp(min=1))[both_C > 0].mean()) if both_C.any() else 0.0,
        "accuracy": float((predicted_NC == true_NC).all(1).double().mean()),
    }


def average_precision(scores_N: Tensor, true_N: Tensor) -> float | None:
    """The sum over thresholds of precision times the gain in recall; None where nothing is true."""
    if not true_N.any():
        return None
    scores_N, order_N = scores_N.sort(descending=True)
    hits_N = true_N[order_N].cumsum(0)
    last_N = torch.cat([scores_N[1:] != scores_N[:-1], torch.tensor([True])])  # of equal scores: one threshold
    hits_T, taken_T = hits_N[last_N].double(), (last_N.nonzero()[:, 0] + 1).double()
    gains_T = torch.diff(hits_T, prepend=torch.zeros(1).double())
    return float((gains_T * hits_T / taken_T).sum() / hits_T[-1])


def number_metrics(predicted_N: Tensor, true_N: Tensor) -> dict[str, float]:
    """Mean absolute error and root of the mean squared error in the labels' units, and the share of their variance that
    is explained: 0 where they are all equal."""
    errors_N = predicted_N - true_N
    spread = float(((true_N - true_N.mean()) ** 2).sum())
    return {
        "mae": float(errors_N.abs().mean()),
        "rmse": float((errors_N**2).mean().sqrt()),
        "r2": 1 - float((errors_N**2).sum()) / spread if spread else 0.0,
    }
