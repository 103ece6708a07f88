from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, top_k_accuracy_score

from configs.errors import Diverged
from trainer.metrics import ClassificationMetrics, Meter, Sums, means


def test_metrics_equal_scikit_learn():
    logits, labels = torch.randn(200, 12), torch.randint(0, 11, (200,))
    metrics = ClassificationMetrics(12, torch.device("cpu"))
    for place in range(0, 200, 32):
        metrics.update(logits[place : place + 32], {"labels": labels[place : place + 32]})
    found, predicted = metrics.compute(), logits.argmax(1)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(12)))


def hits(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"accuracy": logits.argmax(1) == labels}


@pytest.mark.parametrize("kept_elements", [1, 10**6])
def test_sums_do_not_depend_on_how_often_they_are_read(kept_elements):
    steps = [
        (torch.rand(()), 3 + n % 4, torch.randn(3 + n % 4, 5), torch.randint(0, 5, (3 + n % 4,))) for n in range(20)
    ]
    results = []
    for every in (1, 7, 20):
        meter, sums = Meter(hits), Sums()
        meter.KEPT_ELEMENTS = kept_elements
        for step, (loss, count, logits, labels) in enumerate(steps, 1):
            meter.add(loss, count, (logits, labels), step)
            if step % every == 0:
                meter.read(sums)
        meter.read(sums)
        results.append(sums)
    assert results[0] == results[1] == results[2]
    samples = sum(count for _, count, _, _ in steps)
    right = sum(int((logits.argmax(1) == labels).sum()) for _, _, logits, labels in steps)
    assert means(results[0])["accuracy"] == right / samples
    assert means(results[0])["loss"] == pytest.approx(sum(loss.item() * count for loss, count, _, _ in steps) / samples)


def test_a_loss_that_is_not_finite_names_its_step():
    meter = Meter()
    for step, loss in enumerate([1.0, float("nan"), 2.0], 5):
        meter.add({"loss": torch.tensor(1.0), "loss/part": torch.tensor(loss)}, 1, (), step)
    with pytest.raises(Diverged, match="loss/part is nan at step 6"):
        meter.read({})


def test_a_step_that_is_not_finite_counts_for_nothing_however_it_was_cut():
    """Of three steps of eight samples, the sixth of the second step's is bad."""
    losses = torch.arange(24.0).reshape(3, 8)
    losses[1, 5] = torch.nan

    def pending(micro: int, samples: slice = slice(0, 8)) -> Meter:
        meter = Meter(finite_only=True)
        for step, of_step in enumerate(losses[:, samples], 1):
            for part in of_step.split(micro):
                meter.add(part.mean(), len(part), (), step)
        return meter

    def read(meter: Meter) -> dict[str, float]:
        meter.read(found := Sums())
        return means(found)

    one, other = pending(2, slice(0, 4)), pending(3, slice(4, 8))  # two processes, unevenly cut
    one.gather = lambda said: [said, (other.rows(), {}, 0)]
    right = {"loss": (sum(range(8)) + sum(range(16, 24))) / 16}
    assert read(pending(8)) == read(pending(2)) == read(one) == right


def test_what_processes_say_is_added_up_in_their_order():
    """So that the last bits do not depend on how many steps are read at once; a process may have nothing to say."""
    told = [([(step, 3.0, {"loss": value / 7}) for step in (1, 2)], {"accuracy": 2.0}, 3) for value in (1, 5, 3)]
    results = []
    for each in ([1, 2], [1], [2]):
        parts = [([row for row in rows if row[0] in each], hits, samples) for rows, hits, samples in told]
        meter = Meter(gather=lambda said, parts=parts: [*parts, said])
        meter.read(found := Sums())
        results.append(found)
    whole, first, second = results
    assert whole["loss"] == [first["loss"][0] + second["loss"][0], 18.0]
    assert whole["accuracy"] == [6.0, 9]
