"""Detection: losses, mean average precision, and the guarantees of every task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import ModelError, build
from models.detection import SmallFCOS, generalized_iou_losses
from models.model import check_name, input_size
from models.summary import summarize
from tests.conftest import FSDP, ROOT, lines_of
from tests.test_scale import apart
from trainer.detection_metrics import DetectionMetrics


def random_batch(images: int, seed: int = 0, size: int = 64) -> dict[str, Tensor]:
    """The second image has no boxes."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(images, 3, 2, generator=generator) * size / 2
    boxes = torch.cat([low, low + 3 + torch.rand(images, 3, 2, generator=generator) * size / 2], 2)
    labels = torch.randint(0, 3, (images, 3), generator=generator)
    labels[1] = -1
    labels[0, 2] = -1
    pixels = torch.randint(0, 255, (images, 1, size, size), generator=generator, dtype=torch.uint8)
    return {"images_BCHW": pixels, "boxes_BM4": boxes, "labels_BM": labels, "ids": torch.arange(images)}


def arguments(batch: dict[str, Tensor], part: slice = slice(None)) -> tuple[Tensor, ...]:
    return batch["images_BCHW"][part], batch["boxes_BM4"][part], batch["labels_BM"][part]


def test_any_cut_into_micro_batches_has_the_same_loss_and_gradients():
    torch.manual_seed(0)
    model, batch = SmallFCOS(3, 1, 64, width=16).double().train(), random_batch(6)
    results = []
    for cuts in ([6], [1] * 6, [2, 4], [1, 5]):
        model.zero_grad()
        start, loss = 0, 0.0
        for count in cuts:
            losses, _ = model(*arguments(batch, slice(start, start + count)))
            (losses["loss"] * count / 6).backward()
            loss, start = loss + losses["loss"].item() * count / 6, start + count
        results.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-12)
        assert (gradient - results[0][1]).norm() / gradient.norm() < 1e-12


def test_padding_changes_no_loss():
    torch.manual_seed(0)
    model, batch = SmallFCOS(3, 1, 64, width=16).train(), random_batch(4)
    images, boxes, labels = arguments(batch)
    padded = torch.cat([boxes, boxes.new_full((4, 2, 4), -1)], 1), torch.cat([labels, labels.new_full((4, 2), -1)], 1)
    assert model(images, boxes, labels)[0]["loss"].item() == model(images, *padded)[0]["loss"].item()


def test_every_box_has_a_point_that_learns_it_and_overlapping_ones_go_to_the_smaller():
    from models.detection import Points

    points = Points([torch.zeros(1, 1, 64 // stride, 64 // stride) for stride in (8, 16, 32)])
    corners = torch.rand(200, 1, 2, generator=torch.Generator().manual_seed(0)) * 40
    sides = 1 + torch.rand(200, 1, 2, generator=torch.Generator().manual_seed(1)) * 23
    boxes = torch.cat([corners, corners + sides], 2)
    positive, _ = points.matches(boxes, torch.zeros(200, 1, dtype=torch.int64))
    assert positive.any(1).all()
    two = torch.tensor([[[0.0, 0.0, 30.0, 30.0], [8.0, 8.0, 24.0, 24.0]]])
    positive, which = points.matches(two, torch.tensor([[0, 1]]))
    assert set(which[positive].tolist()) == {1}
    assert not points.matches(two, torch.tensor([[-1, -1]]))[0].any()


def test_losses_of_boxes_are_those_of_torchvision():
    from torchvision.ops import generalized_box_iou_loss

    low = torch.rand(4, 200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 40
    sides = 1 + torch.rand(4, 200, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 30
    found, true = torch.cat([low, low + sides], 2)[:2].requires_grad_(), torch.cat([low, low + sides], 2)[2:]
    mine, reference = generalized_iou_losses(found, true), generalized_box_iou_loss(found, true)
    assert 0.05 < (reference < 1).double().mean() < 0.95  # some overlap, some do not
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(losses.sum(), found)[0] for losses in (mine, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_the_losses_are_one_graph():
    """So that they can be compiled, and wait for no device: nothing asks what was found."""
    torch.manual_seed(0)
    model, batch = SmallFCOS(3, 1, 64, width=16).train(), random_batch(4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(*arguments(batch))[0]["loss"].item() == model(*arguments(batch))[0]["loss"].item()


def found_and_true(seed: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Boxes that lie more or less where they should, some missing, some too many, with equal scores among them."""
    batch, generator = random_batch(12, seed), torch.Generator().manual_seed(seed)
    found = []
    for boxes, labels in zip(batch["boxes_BM4"], batch["labels_BM"]):
        shaken = boxes + torch.randn(3, 4, generator=generator) * 2
        more = torch.tensor([[1.0, 1.0, 20.0, 20.0]])
        scores = (torch.rand(4, generator=generator) * 10).round() / 10
        found.append(
            {"boxes": torch.cat([shaken, more]), "scores": scores, "labels": labels.clamp(min=0).repeat(2)[:4]}
        )
    return found, batch


def parts_of(batch: dict[str, Tensor], places: list[int]) -> dict[str, Tensor]:
    return {name: values[places] for name, values in batch.items()}


def test_the_metrics_are_those_of_torchmetrics_in_any_order():
    from torchmetrics.detection import MeanAveragePrecision

    found, batch = found_and_true(0)
    reference = MeanAveragePrecision(backend="faster_coco_eval")
    true = [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0]}
        for boxes, labels in zip(batch["boxes_BM4"], batch["labels_BM"])
    ]
    reference.update(found, true)
    wanted = reference.compute()
    for order in (list(range(12)), list(reversed(range(12)))):
        metrics = DetectionMetrics()
        for places in (order[:5], order[5:6], order[6:]):
            metrics.update([found[place] for place in places], parts_of(batch, places))
        values = metrics.compute()
        assert values == {n: float(wanted[k]) for n, k in zip(DetectionMetrics.NAMES, ("map", "map_50", "map_75"))}
    assert 0.05 < values["map"] < values["map50"] < 1


def test_nothing_found_and_nothing_there_are_no_error():
    metrics = DetectionMetrics()
    assert metrics.compute() == {"map": 0, "map50": 0, "map75": 0}
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    metrics.update([none] * 12, found_and_true(0)[1])
    assert metrics.compute()["map50"] == 0


@pytest.mark.parametrize(
    "name", ["fcos/resnet18", "retinanet/resnet18", "fasterrcnn/resnet18", "ssdlite320_mobilenet_v3_large"]
)
def test_torchvision_detectors_count_the_users_classes(name):
    model = build(name, num_classes=3, in_channels=1, image_size=input_size(name, 64))
    model.describe(task="detection", classes=["a", "b", "c"], image_size=64, mean=(0.5,), std=(0.25,))
    batch = random_batch(2, size=input_size(name, 64))
    assert ("; without the second stage" in summarize(model, 1, input_size(name, 64), 2)) == name.startswith("faster")
    losses, none = model.train()(*arguments(batch))
    assert losses["loss"].isfinite() and none is None
    losses["loss"].backward()
    with torch.no_grad():
        none, detections = model.eval()(*arguments(batch))
    assert none is None and len(detections) == 2
    assert all(0 <= label < 3 for found in detections for label in found["labels"].tolist())
    again = build(name, **model.model_args)
    again.load_state_dict(model.state_dict())


@pytest.mark.long
def test_every_torchvision_detector_is_built():
    from models.torchvision_detectors import torchvision_names

    for name in torchvision_names():
        if "/" not in name or name.endswith("resnet34"):
            losses, _ = build(name, num_classes=3, image_size=96).train()(
                torch.zeros(2, 3, *[input_size(name, 96)] * 2, dtype=torch.uint8), *arguments(random_batch(2))[1:]
            )
            assert losses["loss"].isfinite(), name


def test_a_model_of_another_task_is_refused():
    with pytest.raises(
        ModelError, match="'resnet18' is a model for images alone: did you mean .*fcos/resnet18.* for detection"
    ):
        check_name("resnet18", "detection")
    with pytest.raises(ModelError, match="'small_fcos' is a model for boxes: did you mean .*, for classification"):
        check_name("small_fcos", "classification")


OPTIONS = (
    "--dataset digit_scenes --model tiny_fcos --batch_size 16 --epochs 2 --cpu_threads 1 --log_every 2 --num_workers 0 "
    "--trace_samples --ema_decay 0.9 --grad_clip 5 --max_bad_fraction 0.5"
).split()


def train(folder: Path, name: str, *flags: Any, processes: int = 1, sharded: bool = False) -> Path:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "tests/detection_net.py", *OPTIONS, *map(str, flags),
         "--output_dir", str(folder), "--experiment_name", name],
        cwd=ROOT, env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (FSDP if sharded else {}),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert json.loads((folder / name / "status.json").read_text())["state"] in ("done", "preempted"), done.stderr
    assert ("sharded by FSDP2" in done.stdout) == sharded
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("detection")


EXACT = "--dtype float64 --optimizer sgd --lr 0.01".split()


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    return train(folder, "whole", *EXACT, "--micro_batch_size", 5)


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_processes_change_nothing(folder, whole, processes, streamed):
    """Nor do streams change the metrics: 19 scenes on 2 or 4 processes."""
    flags = [*EXACT, "--micro_batch_size", 8]
    one = whole if not streamed else train(folder, "streamed", *flags, "--streaming")
    more = ["--streaming"] if streamed else []
    check_alike(one, train(folder, f"{processes}_{streamed}", *flags, *more, processes=processes))


def check_alike(one: Path, other: Path) -> None:
    """Weights, samples and metrics of two runs in float64."""
    assert apart(one, other, "model.safetensors") < 1e-9
    assert apart(one, other, "ema.safetensors") < 1e-9
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    for line, same in zip(lines_of(one, "val"), lines_of(other, "val"), strict=True):
        assert {n: line[n] for n in DetectionMetrics.NAMES} == {n: same[n] for n in DetectionMetrics.NAMES}
        assert line.get("loss", 0) == pytest.approx(same.get("loss", 0), rel=1e-5)


@pytest.mark.long
def test_a_detector_that_is_sharded_learns_the_same(folder, whole):
    check_alike(whole, train(folder, "sharded", *EXACT, "--micro_batch_size", 8, processes=2, sharded=True))


@pytest.mark.long
@pytest.mark.parametrize("name", ["fcos/resnet18", "fasterrcnn/resnet18"])
def test_detectors_of_torchvision_are_sharded(folder, name):
    """Their losses are normalised over a micro-batch, so that it is of one size."""
    flags = [*EXACT, "--model", name, "--batch_size", 4, "--micro_batch_size", 2, "--max_steps", 2]
    one = train(folder, f"{name[:4]}_one", *flags)
    check_alike(one, train(folder, f"{name[:4]}_two", *flags, processes=2, sharded=True))


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(folder, whole, sharded):
    for number, processes in enumerate((1, 2, 4, 1)):
        stop = ["--stop_after_steps", 2] if number < 3 else []
        flags = [*EXACT, "--micro_batch_size", 4, *stop]
        run = train(folder, f"course_{sharded}", *flags, processes=processes, sharded=sharded and processes > 1)
    check_alike(whole, run)
    line, same = (lines_of(one, "epoch")[-1] for one in (whole, run))
    assert line["loss"] == pytest.approx(same["loss"], rel=1e-6)


def test_an_absent_package_is_told_before_the_first_step(monkeypatch):
    from configs.errors import UserError
    from trainer import detection_metrics

    monkeypatch.setattr(detection_metrics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torchmetrics and faster-coco-eval") as error:
        detection_metrics.check_installed()
    assert "[detection]" in str(error.value.fix)
