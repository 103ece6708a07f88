"""Lists of classes, numbers, class weights: the losses and metrics of each against scikit-learn and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from configs.arguments import make_config
from configs.dataset_info import DatasetInfo
from configs.errors import ConfigError, DataError
from data.balance import class_weights, positive_weights
from data.columns import values_of
from data.described import described
from data.kinds import open_labels
from data.labels import ClassLabels
from data.targets import MultiLabels, NumberLabels
from tests.tiny import TinyNet, tiny_trainer, weights
from trainer.row_metrics import RowMetrics
from trainer.targets import target_of

CPU = torch.device("cpu")
INFO = DatasetInfo()


def measured(metrics, outputs, labels) -> dict[str, float]:
    for part in torch.arange(len(outputs)).split(7):
        metrics.update(outputs[part], {"labels": labels[part]})
    return metrics.compute()


def test_metrics_of_several_classes_equal_scikit_learn():
    torch.manual_seed(0)
    logits, labels = torch.randn(60, 5).round(decimals=1), (torch.rand(60, 5) < 0.3).to(torch.int8)  # with ties
    found = measured(target_of({"kind": "multi_label"}, list("abcde"), CPU).new_metrics(), logits, labels)
    assert found == pytest.approx({
        "map": average_precision_score(labels, logits, average="macro"),
        "f1": f1_score(labels, logits > 0, average="macro"),
        "accuracy": accuracy_score(labels, logits > 0),
    })  # fmt: skip


def test_a_class_that_never_occurs_has_no_average_precision():
    metrics = target_of({"kind": "multi_label"}, ["a", "b"], CPU).new_metrics()
    found = measured(metrics, torch.tensor([[2.0, -1], [1, -1]]), torch.tensor([[0, 0], [1, 0]], dtype=torch.int8))
    assert found == {"map": 0.5, "f1": pytest.approx(2 / 3), "accuracy": 0.5}


def test_metrics_of_numbers_equal_scikit_learn_in_the_labels_own_units():
    torch.manual_seed(0)
    outputs = torch.randn(50, 1, dtype=torch.float64)
    labels = outputs[:, 0] * 30 + 200 + torch.randn(50) * 5
    target = target_of({"kind": "numbers", "mean": 190.0, "std": 25.0}, ["weight"], CPU)
    predicted = outputs[:, 0] * 25 + 190
    assert measured(target.new_metrics(), outputs, labels) == pytest.approx({
        "mae": mean_absolute_error(labels, predicted),
        "rmse": root_mean_squared_error(labels, predicted),
        "r2": r2_score(labels, predicted),
    })  # fmt: skip
    assert target.rows(target.predicted(outputs[:1])) == [{"weight": pytest.approx(predicted[0].item(), rel=1e-5)}]


def test_rows_without_a_sample_have_no_metrics():
    assert RowMetrics(lambda outputs, labels: {"never": 0.0}, 3, CPU).compute() == {}


def test_losses_are_those_of_torch():
    torch.manual_seed(0)
    logits, classes, weights_C = torch.randn(8, 3), torch.randint(0, 3, (8,)), [0.5, 1.0, 2.5]
    plain = target_of({}, list("abc"), CPU, label_smoothing=0.1).criterion()
    assert torch.equal(plain(logits, classes), nn.CrossEntropyLoss(label_smoothing=0.1)(logits, classes))
    weighted = target_of({"kind": "classes", "weights": weights_C}, list("abc"), CPU).criterion()
    each = nn.CrossEntropyLoss(reduction="none")(logits, classes) * torch.tensor(weights_C)[classes]
    assert torch.allclose(weighted(logits, classes), each.mean())
    many = (torch.rand(8, 3) < 0.5).to(torch.int8)
    found = target_of({"kind": "multi_label", "weights": weights_C}, list("abc"), CPU).criterion()(logits, many)
    assert torch.allclose(found, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights_C))(logits, many.float()))
    numbers = torch.randn(8)
    found = target_of({"kind": "numbers", "mean": 1.0, "std": 2.0}, ["x"], CPU).criterion()(logits[:, :1], numbers)
    assert torch.allclose(found, nn.MSELoss()(logits[:, 0], (numbers - 1) / 2))


def test_class_weights_equal_scikit_learn_and_have_the_mean_1_over_samples():
    labels = np.repeat([0, 1, 2, 4], [50, 20, 3, 7])
    counts = np.bincount(labels, minlength=5)
    balanced, root = (class_weights(counts, len(labels), root=root) for root in (False, True))
    assert balanced[[0, 1, 2, 4]] == pytest.approx(
        compute_class_weight("balanced", classes=np.array([0, 1, 2, 4]), y=labels)
    )
    assert balanced[labels].mean() == pytest.approx(1)
    assert root[labels].mean() == pytest.approx(1)
    assert root[0] / root[2] == pytest.approx(np.sqrt(3 / 50))
    assert balanced[3] == root[3] == 1
    assert positive_weights(np.array([10, 0, 40]), 40, root=False).tolist() == [3.0, 1.0, 1.0]


def test_weights_are_those_of_the_training_split():
    kind = ClassLabels(["a", "b"])
    assert described(kind, np.array([0, 0, 0, 1]), "balanced") == {
        "kind": "classes", "weights": pytest.approx([2 / 3, 2.0])
    }  # fmt: skip
    assert described(kind, np.array([0, 1]), "none") == {"kind": "classes"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_weights": "sqrt", "sampling": "balanced"}, "both make up for rare classes"),
        ({"class_weights": "balanced", "streaming": True}, "needs all data at hand"),
        ({"label_column": "a", "label_columns": ("a", "b")}, "both name the labels"),
        ({"loss_weights": ("digit",)}, "NAME=NUMBER"),
        ({"loss_weights": ("digit=-1",)}, "NAME=NUMBER"),
        ({"loss_weights": ("learnt", "digit=1")}, "NAME=NUMBER"),
    ],
)
def test_what_contradicts_itself_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        make_config(**options)


def opened(feature, values=None, **options):
    column = (lambda name: np.array([*values, None], object)[:-1]) if values is not None else None
    return open_labels({"tags": feature}, column, make_config(**options), INFO, "x")


def test_lists_of_classes_are_found_by_their_type():
    kind = opened(List(ClassLabel(names=["cat", "dog", "owl"])))
    assert (kind.name, kind.classes) == ("multi_label", ["cat", "dog", "owl"])
    labels = kind.read({"tags": [[0, 2], [], None, [1, 1]]}, "x")
    assert [label.tolist() for label in labels] == [[1, 0, 1], [0, 0, 0], [-1, -1, -1], [0, 1, 0]]
    assert kind.faults(labels).tolist() == [2]
    assert kind.strata(labels[[0, 1, 3]]).tolist() == [0, 3, 1]
    batch = kind.collate(labels[:2])["labels"]
    assert (batch.dtype, batch.tolist()) == (torch.int8, [[1, 0, 1], [0, 0, 0]])
    with pytest.raises(DataError, match="label 3 is none of the 3"):
        kind.read({"tags": [[3]]}, "x")
    assert kind.fault(kind.read({"tags": [[3]]}, "x", strict=False)[0])


def test_lists_of_names_numbers_and_of_a_0_or_1_a_class():
    names = opened(List(Value("string")), [["owl"], ["cat", "owl"], []])
    assert (names.classes, names.read({"tags": [["owl"]]}, "x")[0].tolist()) == (["cat", "owl"], [0, 1])
    numbers = opened(List(Value("int64")), [[2], [0, 1], []])
    assert (len(numbers.classes), numbers.multi_hot) == (3, False)
    hot = opened(List(Value("int64")), [[0, 0, 1], [1, 1, 0]])
    assert (len(hot.classes), hot.multi_hot) == (3, True)
    assert hot.read({"tags": [[1, 0, 1]]}, "x")[0].tolist() == [1, 0, 1]
    streamed = opened(List(Value("int64"), length=4))
    assert (len(streamed.classes), streamed.multi_hot) == (4, True)
    with pytest.raises(DataError, match="before the stream has been read"):
        opened(List(Value("string")))


def test_numbers_are_found_by_their_type_and_a_missing_one_is_a_fault():
    values = np.array([1.0, 3.0, np.nan, 5.0])
    kind = open_labels({"image": Value("binary"), "age": Value("float32")}, lambda _: values, make_config(), INFO, "x")
    assert (kind.name, kind.mean, kind.std) == ("numbers", 3.0, pytest.approx(np.std([1, 3, 5])))
    labels = kind.read({"age": [1, None, float("inf"), 2.5]}, "x")
    assert kind.faults(labels).tolist() == [1, 2]
    assert kind.collate(labels[:1])["labels"].tolist() == [1.0]
    with pytest.raises(DataError, match="'old' is no number"):
        kind.read({"age": ["old"]}, "x")
    whole = {"age": Value("int64"), "label": ClassLabel(names=["a"])}
    assert open_labels(whole, lambda _: values, make_config(), INFO, "x").name == "classes"
    asked = make_config(labels="numbers", label_column="age")
    assert open_labels(Features(whole), lambda _: values, asked, INFO, "x").name == "numbers"


class Tagged(TinyNet):
    def __init__(self, kind: str, outputs: int):
        super().__init__(outputs)
        self.labels = {"kind": kind} | ({"mean": 10.0, "std": 2.0} if kind == "numbers" else {})


@pytest.mark.parametrize(
    ("kind", "monitor", "reached"), [("multi_label", "map", lambda v: v > 0.99), ("numbers", "mae", lambda v: v < 0.4)]
)
def test_one_batch_is_learnt_by_heart(tmp_path, kind, monitor, reached):
    torch.manual_seed(0)
    bright = torch.rand(16)
    images = torch.randn(16, 1, 6, 6) * 0.1 + bright[:, None, None, None] * 4
    many = torch.stack([bright > 0.5, bright < 0.3, bright > -1], 1).to(torch.int8)
    batch = {"images_BCHW": images, "labels": many if kind == "multi_label" else bright * 8 + 6}
    model = Tagged(kind, 3 if kind == "multi_label" else 1)
    trainer = tiny_trainer(tmp_path, [batch], [batch], model=model, epochs=150, batch_size=16, lr=0.03)
    result = trainer.train()
    assert (result["best"]["metric"], reached(result["best"]["value"])) == (monitor, True)
    rows = trainer.as_rows(trainer.inference(images))
    if kind == "numbers":
        assert rows[0]["0"] == pytest.approx(bright[0].item() * 8 + 6, abs=1)
    else:
        assert rows[0]["labels"] == [str(c) for c in range(3) if many[0, c]]


def test_micro_batches_change_nothing_under_class_weights(tmp_path):
    torch.manual_seed(0)
    images, labels = torch.randn(32, 1, 6, 6).double(), torch.randint(0, 3, (32,))
    ends = []
    for size in (32, 8, 5):
        model = TinyNet()
        model.labels = {"kind": "classes", "weights": [0.2, 1.0, 4.0]}
        batches = [(images[i : i + size], labels[i : i + size]) for i in range(0, 32, size)]
        trainer = tiny_trainer(
            tmp_path / str(size), batches, model=model.double(), epochs=5, batch_size=32, lr=0.1, optimizer="sgd"
        )
        trainer.train()
        ends.append(weights(trainer))
    assert all((end - ends[0]).norm() / ends[0].norm() < 1e-12 for end in ends[1:])


def test_the_rarest_class_and_tenths_are_what_a_split_keeps_the_shares_of():
    kind = MultiLabels(["often", "seldom"])
    labels = np.array([None] * 4, object)
    for place, label in enumerate([[1, 0], [1, 1], [1, 0], [0, 0]]):
        labels[place] = np.array(label, np.int8)
    assert kind.strata(labels).tolist() == [0, 1, 0, 2]
    assert np.bincount(NumberLabels("x").strata(np.arange(100.0))).tolist() == [10] * 10


def test_numbers_keep_their_digits_or_are_refused():
    """Columns are read as they are; what float32 cannot tell apart cannot be learnt."""
    features = Features({"time": Value("float64")})
    far = Dataset.from_dict({"time": [1.7e9 + n for n in range(79)] + [None]}, features=features)
    values = values_of(far, "time")
    assert (values.dtype, values[1] - values[0], len(np.unique(values[:79]))) == (np.float64, 1.0, 79)
    assert np.isnan(values[79])
    kind = NumberLabels("time")
    with pytest.raises(DataError, match="79 different values of time are 2 in float32") as error:
        kind.check(values[:79], "x")
    assert "subtract their mean 1.7e+09" in str(error.value)
    kind.check(values[:79] - 1.7e9, "x")


def test_what_is_no_class_in_a_list_is_a_fault():
    kind = opened(List(Value("int64")), [[2], [0, 1], []])
    assert kind.faults(kind.read({"tags": [[1, None], [1], [1, 1.5]]}, "x", strict=False)).tolist() == [0, 2]
    with pytest.raises(DataError, match="label None is none of the 3"):
        kind.read({"tags": [[1, None]]}, "x")
    assert kind.read({"tags": [[np.int64(2), 1.0]]}, "x")[0].tolist() == [0, 1, 1]
