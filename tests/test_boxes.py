"""Boxes as labels: how they are read, and that they stay on their objects."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs.arguments import make_config
from configs.dataset_info import DatasetInfo
from configs.errors import ConfigError, DataError
from data.box_dataset import BoxTransform, train_box_transform
from data.boxes import Boxes, BoxLabels
from data.dataset import load_data
from data.loader import eval_loader, train_loader
from tests.conftest import run_script

NAMES = ["cat", "dog"]
SCENES = [  # boxes xywh and classes of pictures of 40x30 pixels
    ([[4, 2, 10, 20], [20.0, 10.0, 15.0, 5.0]], [0, 1]),
    ([], []),
    ([[0, 0, 40, 30]], [1]),
    ([[30, 20, 20, 20], [1, 1, 8, 8]], [1, 0]),  # the first leads out of the picture
] * 4


def picture(number: int) -> Image.Image:
    """Every object is a bright rectangle of its own."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    for (x, y, w, h), c in zip(*SCENES[number]):
        pixels[int(y) : int(y + h), int(x) : int(x + w)] = 120 + 100 * c
    pixels[0, 0, 2] = number
    return Image.fromarray(pixels)


def hub(folder: Path, form: str = "lists") -> Path:
    """The scenes as a parquet dataset: a struct of lists with ClassLabels, or a list of structs with names."""
    category: Any = datasets.ClassLabel(names=NAMES) if form == "lists" else datasets.Value("string")
    bbox = datasets.List(datasets.Value("float32"), length=4)
    if form == "lists":
        objects: Any = {"bbox": datasets.List(bbox), "category": datasets.List(category)}
        cells: list[Any] = [{"bbox": boxes, "category": classes} for boxes, classes in SCENES]
    else:
        objects = datasets.List({"bbox": bbox, "category": category})
        cells = [[{"bbox": b, "category": NAMES[c]} for b, c in zip(*scene)] for scene in SCENES]
    table = {"image": [picture(n) for n in range(len(SCENES))], "objects": cells}
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(folder / "train.parquet"))
    return folder


def coco(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    annotations = []
    for number, (boxes, classes) in enumerate(SCENES):
        picture(number).save(folder / f"{number:02d}.png")
        annotations += [{"image_id": number, "category_id": 7 * c + 1, "bbox": b} for b, c in zip(boxes, classes)]
    annotations.append({"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    images = [{"id": n, "file_name": f"{n:02d}.png", "width": 40, "height": 30} for n in range(len(SCENES))]
    categories = [{"id": 8, "name": "dog"}, {"id": 1, "name": "cat"}]
    table = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(table))
    return folder


def voc(folder: Path) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number, (boxes, classes) in enumerate(SCENES):
        picture(number).save(folder / "JPEGImages" / f"{number:02d}.png")
        objects = "".join(
            f"<object><name>{NAMES[c]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
            f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for (x, y, w, h), c in zip(boxes, classes)
        )
        text = f"<annotation><filename>{number:02d}.png</filename>{objects}</annotation>"
        (folder / "Annotations" / f"{number:02d}.xml").write_text(text)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{n:02d}\n" for n in range(12)))
    (folder / "ImageSets" / "Main" / "val.txt").write_text("".join(f"{n:02d}\n" for n in range(12, 16)))
    return folder


def config(**options: Any):
    return make_config(**({"batch_size": 4, "image_size": 32, "num_workers": 0, "augment": "none"} | options))


def batches(options: dict[str, Any], part: str = "train", **shares: int) -> list[dict[str, Any]]:
    data = load_data(config(**options))
    if part == "train":
        return list(train_loader(config(**options), data, **shares))
    assert data.val is not None
    return list(eval_loader(config(**options), data.val, 32, **shares))


def by_id(made: list[dict[str, Any]]) -> dict[int, tuple[torch.Tensor, list[Any], list[int]]]:
    """Pixels, boxes and classes of each sample."""
    found = {}
    for batch in made:
        for slot, sample in enumerate(batch["ids"].tolist()):
            labels = batch["labels_BM"][slot]
            boxes = batch["boxes_BM4"][slot][labels >= 0]
            found[sample] = (batch["images_BCHW"][slot], boxes.tolist(), labels[labels >= 0].tolist())
    return found


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    first, second = by_id(one), by_id(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[k][0], second[k][0]) and first[k][1:] == second[k][1:] for k in first
    )


def test_cells_are_read_and_what_is_no_box_is_left_out_and_counted():
    kind = BoxLabels(NAMES, ("objects", "width", "height"))
    boxes = [[1, 2, 3, 4], [5, 5, 0, 3], [float("nan"), 0, 1, 1], [-9, 0, 8, 8], [50, 1, 4, 4], [1, 1, -2, 5]]
    cells = {
        "objects": [{"bbox": boxes, "category": [1, 0, 0, 0, 0, 0]}, None, [{"bbox": [0, 0, 2, 2], "category": "dog"}],
                    {"bbox": [[0, 0, 1, 1]], "category": [2]}, {"bbox": [[0, 0, 1]], "category": [0]}],
        "width": [40] * 5, "height": [30] * 5,
    }  # fmt: skip
    labels = kind.read(cells, "here")
    assert labels[0].boxes_xyxy.tolist() == [[1, 2, 4, 6]] and labels[0].classes.tolist() == [1]
    assert kind.dropped == 5 and "5 boxes without area" in str(kind)
    assert len(labels[1]) == 0 and not kind.fault(labels[1])
    assert labels[2].classes.tolist() == [1]
    assert kind.faults(labels).tolist() == [3, 4]
    assert "class 2 of a box is none of the 2 training classes" in kind.fault(labels[3])
    assert kind.counts(labels[:3]).tolist() == [0, 2]
    assert kind.strata(labels[:3]).tolist() == [1, -1, 1]
    batch = kind.collate(labels[:3])
    assert batch["boxes_BM4"].shape == (3, 1, 4) and batch["labels_BM"].tolist() == [[1], [-1], [1]]


@pytest.mark.parametrize("form", ["lists", "structs"])
def test_coco_voc_and_hub_hold_the_same(tmp_path, form):
    folder = hub(tmp_path / "hub", form)
    made = [
        batches({"dataset": str(folder), "split": (1, 0, 0), "max_steps": 4}),
        batches({"train_data_dir": str(coco(tmp_path / "coco")), "split": (1, 0, 0)}),
        batches({"dataset": str(folder), "split": (1, 0, 0), "streaming": True}),
    ]
    truth = by_id(made[0])
    assert len(truth) == 16 and len(truth[0][1]) == 2 and truth[1][1] == []
    assert truth[0][1][0] == pytest.approx([4 * 0.8, 2 * 32 / 30, 14 * 0.8, 22 * 32 / 30])  # in pixels of the square
    assert truth[3][1][0] == pytest.approx([30 * 0.8, 20 * 32 / 30, 32, 32])
    assert same(made[0], made[1]) and same(made[0], made[2])
    options = {"train_data_dir": str(voc(tmp_path / "voc"))}  # its lists tell the splits
    first, last = batches(options), batches(options, "val")
    assert {k: v[1:] for k, v in by_id(first).items()} == {k: v[1:] for k, v in truth.items() if k < 12}
    assert len(by_id(last)) == 4


def test_a_crop_and_a_flip_take_the_boxes_along():
    """Where a box is, its object is: bright inside, dark outside."""
    transform = train_box_transform(config(augment="default"), 32, horizontal_flip=True, zoom=True)
    pixels = torch.zeros(3, 60, 80, dtype=torch.uint8)
    pixels[:, 10:40, 20:30] = 200
    label, flipped = Boxes(np.array([[20, 10, 30, 40]], np.float32), np.array([1])), set()
    for key in range(40):
        image, found, size = transform(pixels, label, key, 3)
        assert image.shape == (3, 32, 32) and size == (60, 80) and len(found) == 1
        left, top, right, bottom = found.boxes_xyxy[0]
        mask = torch.zeros(32, 32, dtype=torch.bool)
        mask[round(top) : round(bottom), round(left) : round(right)] = True
        bright = image[0] > 100
        assert (bright & mask).sum() / (bright | mask).sum() > 0.6, key
        flipped.add(bool(left > 16))
    assert flipped == {True, False}
    again = transform(pixels, label, 7, 3)
    assert torch.equal(again[0], transform(pixels, label, 7, 3)[0])


def test_boxes_that_may_not_be_zoomed_keep_their_size():
    label = Boxes(np.array([[3, 4, 20, 24]], np.float32), np.array([0]))
    pixels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    for zoom, sizes in ((True, 3), (False, 1)):
        transform = train_box_transform(config(augment="default"), 32, horizontal_flip=True, zoom=zoom)
        boxes = [transform(pixels, label, key, 1)[1].boxes_xyxy[0] for key in range(20)]
        assert len({(round(float(b[2] - b[0]), 3), round(float(b[3] - b[1]), 3)) for b in boxes}) >= sizes
        assert zoom or all((b[2:] - b[:2] == [17, 20]).all() for b in boxes)


def test_a_picture_without_boxes_is_augmented_as_well():
    transform = train_box_transform(config(augment="default"), 32, horizontal_flip=True, zoom=True)
    for key in range(10):
        assert len(transform(torch.zeros(1, 20, 20, dtype=torch.uint8), BoxLabels.blank, key, 1)[1]) == 0


def test_an_evaluation_cuts_nothing_away():
    image, found, size = BoxTransform(16)(torch.arange(200, dtype=torch.uint8).reshape(1, 10, 20), two(), 0, 3)
    assert image.shape == (3, 16, 16) and size == (10, 20)
    assert found.boxes_xyxy.tolist() == [[0, 0, 16, 16], [8, 8, 16, 16]]


def two() -> Boxes:
    return Boxes(np.array([[0, 0, 20, 10], [10, 5, 25, 12]], np.float32), np.array([0, 1]))


def test_processes_and_workers_and_streams_change_no_pixel_and_no_box(tmp_path):
    folder = str(hub(tmp_path))
    options = {"dataset": folder, "augment": "default", "split": (0.75, 0.25, 0)}
    whole = batches(options)
    halves = [batch for process in (0, 1) for batch in batches(options, process=process, processes=2)]
    assert same(whole, halves) and same(whole, batches(options | {"num_workers": 2}))
    val = batches(options, "val")
    assert same(val, [batch for p in (0, 1) for batch in batches(options, "val", process=p, processes=2)])
    data = load_data(config(**options))
    loader = train_loader(config(**options), data)
    loader.set_position(0, 2)
    assert same(whole[2:], list(loader))


def test_a_policy_that_would_leave_the_boxes_behind_is_refused():
    with pytest.raises(ConfigError, match="--augment trivialaugment moves pixels and not the boxes"):
        train_box_transform(config(augment="trivialaugment"), 32, horizontal_flip=True, zoom=True)


def test_data_without_boxes_or_classes_are_told(tmp_path):
    with pytest.raises(DataError, match="no column holds boxes"):
        BoxLabels.open({"image": datasets.Image()}, None, config(), DatasetInfo(), "here")
    features = {"objects": {"bbox": datasets.List(datasets.Value("float32"))}}
    with pytest.raises(DataError, match="boxes without a class"):
        BoxLabels.open(features, None, config(), DatasetInfo(), "here")
    (tmp_path / "annotations.json").write_text("{}")
    with pytest.raises(DataError, match="no COCO JSON"):
        load_data(config(train_data_dir=str(tmp_path)))


def test_the_scenes_of_digits_share_no_digit_and_have_exact_boxes():
    data = load_data(make_config(dataset="digit_scenes"), test=True)
    for split in (data.train, data.val, data.test):
        assert split is not None
        images, labels = split.source.images_NCHW, split.labels  # type: ignore[union-attr]
        assert min(map(len, labels)) >= 1 and max(map(len, labels)) <= 5
        for image, label in zip(images[:50, 0], labels):
            rest = image.clone()
            for left, top, right, bottom in label.boxes_xyxy.astype(int):
                inside = image[top:bottom, left:right] > 40
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
                rest[top:bottom, left:right] = 0
            assert not rest.any()


def test_predictions_lie_in_the_pictures_own_pixels(tmp_path):
    """A detector whose boxes are known: what is found on a square lies as far along on a wide picture."""
    from scripts.prediction import in_own_pixels

    found = in_own_pixels({"boxes": torch.tensor([[8.0, 4.0, 16.0, 32.0]])}, height=30, width=40, size=32)
    assert found["boxes"].tolist() == [[10.0, 3.75, 20.0, 30.0]]


def test_a_folder_trains_predicts_and_draws(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = coco(tmp_path / "coco")
    common = ["--output_dir", tmp_path, "--experiment_name", "x", "--image_size", 32, "--num_workers", 0]
    done = run_script("train.py", "--train_data_dir", folder, *common, "--epochs", 1, "--batch_size", 4, "--split",
                      0.5, 0.5, 0, "--cpu_threads", 1, "--use_tensorboard")  # fmt: skip
    assert "boxes of 2 classes" in done.stdout and re.search(r"val loss +map ", done.stdout)
    seen = EventAccumulator(str(tmp_path / "x" / "tensorboard")).Reload()
    assert len(seen.Images("val/detections")) == 1
    run_script("test.py", "--weights", tmp_path / "x", "--on", "val")
    output = tmp_path / "found.csv"
    run_script("predict.py", "--weights", tmp_path / "x", folder, "--output", output, "--draw", tmp_path / "drawn")
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 16
    assert output.read_text().splitlines()[0] == "path,boxes,labels,scores,error"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"category_id": 1}, "the class 'id 1' of a box is none of"), ({"bbox": [1, 2, 3]}, "annotation 2 has the bbox"),
     ({"bbox": None}, "annotation 2 has the bbox None"), ({"bbox": "1,2,3,4"}, "annotation 2 has the bbox '1,2,3,4'")],
)  # fmt: skip
def test_an_annotation_of_coco_that_cannot_be_used_is_told(tmp_path, change, words):
    """Ids of categories are no places: one that is not listed is no class, however small it is."""
    folder = coco(tmp_path)
    file = folder / "_annotations.coco.json"
    table = json.loads(file.read_text())
    table["categories"] = [one | {"id": one["id"] + 10} for one in table["categories"]]
    table["annotations"] = [
        one | {"id": number, "category_id": one["category_id"] + 10} for number, one in enumerate(table["annotations"])
    ]
    table["annotations"][2] |= change
    file.write_text(json.dumps(table))
    with pytest.raises(DataError, match=words):
        load_data(make_config(train_data_dir=str(folder), split=(1, 0, 0)))


def test_numbers_of_classes_may_be_floats():
    kind = BoxLabels(NAMES)
    label = kind.boxes([[0, 0, 5, 5]] * 2, [1.0, np.int64(0)], 10, 10)
    assert (label.classes.tolist(), label.fault) == ([1, 0], "")
    assert "the class 1.5 of a box" in kind.boxes([[0, 0, 5, 5]], [1.5], 10, 10).fault
