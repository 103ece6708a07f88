"""Sources, splits, decoding and loaders."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as scikit_digits

from configs.arguments import make_config
from configs.dataset_info import DATASETS, IMAGENET_MEAN, find_dataset_info
from configs.errors import ConfigError, DataError
from data.batches import ImageDataset
from data.columns import classes_of, numbers_of, values_of
from data.dataset import check_labels, load_data
from data.decode import decode
from data.embedded import load_digits
from data.geometry import Box, Geometry, centre, random_box
from data.labels import ClassLabels
from data.loader import eval_loader, train_loader, workers
from data.order import Draw, Rows, mix_ids
from data.sources import ArrowSource, bytes_of_cell
from data.stream import encoded
from data.transforms import Transform
from trainer.device import default_threads


def test_the_embedded_digits_are_those_of_scikit_learn():
    ours, theirs = load_digits(), scikit_digits()
    assert np.array_equal(ours.labels, theirs.target)
    assert np.array_equal(ours.images_NCHW[:, 0].numpy(), np.round(theirs.images * 255 / 16).astype(np.uint8))
    pixels = ours.images_NCHW.numpy() / 255
    assert DATASETS["digits"].mean == (pytest.approx(pixels.mean(), abs=1e-3),)
    assert DATASETS["digits"].std == (pytest.approx(pixels.std(), abs=1e-3),)


def test_the_split_belongs_to_split_seed_alone():
    first, same, other = (
        load_data(make_config(seed=seed, split_seed=split), test=True) for seed, split in ((0, 0), (5, 0), (0, 1))
    )
    assert np.array_equal(first.test.ids, same.test.ids)
    assert not np.array_equal(first.test.ids, other.test.ids)
    assert len(first.train) + len(first.val) + len(first.test) == 1797
    assert not set(first.train.ids) & set(first.val.ids) | set(first.val.ids) & set(first.test.ids)


def read(loader) -> list[dict]:
    return [{name: value.clone() for name, value in batch.items()} for batch in loader]


@pytest.mark.parametrize("augment", ["none", "default", "autoaugment", "randaugment", "trivialaugment"])
def test_pixels_do_not_depend_on_workers_micro_batches_or_where_one_begins(augment):
    options = {"augment": augment, "random_erasing": 0.5, "batch_size": 200, "split": (0.5, 0.3, 0.2)}
    data = load_data(make_config())
    whole = read(train_loader(make_config(num_workers=0, micro_batch_size=200, **options), data))
    torch.manual_seed(123)  # whatever the process drew before
    loader = train_loader(make_config(num_workers=2, micro_batch_size=70, **options), data)
    loader.set_position(0, 2)
    parts = read(loader)
    for name in ("ids", "labels", "images_BCHW"):
        assert torch.equal(torch.cat([b[name] for b in parts]), torch.cat([b[name] for b in whole[2:]]))
    loader.set_position(1, 0)
    again = {int(number): image for batch in read(loader) for number, image in zip(batch["ids"], batch["images_BCHW"])}
    if augment != "none":
        first = {int(number): image for batch in whole for number, image in zip(batch["ids"], batch["images_BCHW"])}
        changed = [not torch.equal(first[number], again[number]) for number in first.keys() & again.keys()]
        assert np.mean(changed) > 0.5


@pytest.mark.parametrize("said", ["", "False", "true"])
def test_batches_lie_ready_for_a_gpu_unless_the_launcher_says_cpu(monkeypatch, said):
    """`accelerate launch` says "False" on one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", said)
    config = make_config()
    assert train_loader(config, load_data(config)).loader.pin_memory == (said != "true")


def test_threads_and_loader_processes_share_the_cores_that_a_job_was_given(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    split = SimpleNamespace(source=SimpleNamespace(in_memory=False))
    assert (default_threads(1), workers(make_config(), split)) == (6, 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (default_threads(2), workers(make_config(), split)) == (3, 2)
    assert workers(make_config(num_workers=7), split) == 7


def test_augmentation_leaves_the_generator_of_dropout_alone():
    loader = train_loader(make_config(num_workers=0), load_data(make_config()))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    next(iter(loader))
    assert torch.equal(torch.rand(3), expected)


def test_image_folders_find_their_classes_channels_and_validation(image_folder):
    data = load_data(make_config(train_data_dir=str(image_folder), split=(0.75, 0.25, 0.0)))
    assert (data.classes, data.info.channels, data.image_size) == (["bright", "dark"], 1, 10)
    assert (len(data.train), len(data.val), data.test) == (12, 4, None)
    config = make_config(batch_size=4, micro_batch_size=4, num_workers=0)
    (batch, *_) = read(eval_loader(config, data.val, data.image_size))
    assert batch["images_BCHW"].shape == (4, 1, 10, 10)
    assert ((batch["images_BCHW"].float().mean((1, 2, 3)) < 120).long() == batch["labels"]).all()
    given = load_data(make_config(train_data_dir=str(image_folder), val_data_dir=str(image_folder)))
    assert (len(given.train), len(given.val)) == (16, 16)


@pytest.mark.parametrize("labels", ["ClassLabel", "int", "text"])
def test_a_hub_dataset_finds_its_columns_by_type(tmp_path, labels):
    names = ["cat", "dog", "eel"]
    values = [number % 3 for number in range(30)]
    pictures = [Image.new("RGB", (9, 8), (80 * value, 0, 0)) for value in values]
    column = {"ClassLabel": values, "int": values, "text": [names[value] for value in values]}[labels]
    feature = {"ClassLabel": datasets.ClassLabel(names=names), "int": datasets.Value("int64")}.get(
        labels, datasets.Value("string")
    )
    features = datasets.Features({"photo": datasets.Image(), "kind": feature})
    table = datasets.Dataset.from_dict({"photo": pictures, "kind": column}, features=features)
    table.train_test_split(0.2, seed=0).save_to_disk(tmp_path / "set")
    data = load_data(make_config(dataset=str(tmp_path / "set"), label_column="kind"), test=True)
    assert data.classes == (["0", "1", "2"] if labels == "int" else names)
    assert (len(data.train) + len(data.val), len(data.test), data.image_size) == (24, 6, 8)
    for place in range(6):
        assert decode(data.test.source.read(place), "", 3)[0, 0, 0] == 80 * data.test.source.labels[place]
    with pytest.raises(DataError, match="no column 'knd'") as error:
        load_data(make_config(dataset=str(tmp_path / "set"), label_column="knd"))
    with pytest.raises(
        DataError, match="cannot read the file" if labels == "text" else "column 'kind' holds .*, no images"
    ):
        load_data(make_config(dataset=str(tmp_path / "set"), label_column="kind", image_column="kind"))
    assert "kind" in str(error.value)


def test_data_that_cannot_be_learnt_from_are_refused(tmp_path, image_folder):
    with pytest.raises(DataError, match="1438 training samples do not fill one global batch of 2000"):
        train_loader(make_config(batch_size=2000), load_data(make_config()))
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
        train_loader(make_config(batch_size=32), load_data(make_config()), 0, 3)
    with pytest.raises(DataError, match="lower --batch_size to at most 12 and start fewer processes|do not fill"):
        folder = make_config(train_data_dir=str(image_folder), batch_size=16, split=(0.75, 0.25, 0))
        train_loader(folder, load_data(folder), 0, 16)
    with pytest.raises(DataError, match="no such folder"):
        load_data(make_config(train_data_dir=str(tmp_path / "nothing")))
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="no images found"):
        load_data(make_config(train_data_dir=str(tmp_path / "empty")))
    Image.new("L", (4, 4)).save(tmp_path / "empty" / "cat" / "1.png")
    with pytest.raises(DataError, match="two classes or more, found 1: cat"):
        load_data(make_config(train_data_dir=str(tmp_path / "empty"), split=(1.0, 0.0, 0.0)))
    with pytest.raises(DataError, match="the val split is empty"):
        load_data(make_config(train_data_dir=str(tmp_path / "empty")))
    with pytest.raises(DataError, match="no dataset is called 'cifar1o'") as error:
        load_data(make_config(dataset="cifar1o"))
    assert "cifar10" in str(error.value)


def test_a_label_out_of_range_is_named_before_the_first_step(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [Image.new("L", (4, 4))] * 8
    table = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1, 0, 1, 0, -1]}, features=features)
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(
        DataError, match="row 7 of the train split: its label is missing, or none of the 2 training classes"
    ):
        load_data(make_config(dataset=str(tmp_path / "set"), split=(1.0, 0.0, 0.0)))


def test_the_dataset_table_knows_local_folders_by_their_name():
    assert find_dataset_info("some/where/cifar10") is DATASETS["cifar10"]
    assert find_dataset_info("uoft-cs/cifar100") is DATASETS["cifar100"]
    assert find_dataset_info("cats") is None


def test_a_test_split_without_labels_can_be_trained_beside(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [Image.new("L", (4, 4))] * 8
    parts = {"train": [0, 1] * 4, "test": [-1] * 8}
    tables = {
        name: datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
        for name, labels in parts.items()
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "set")
    config = make_config(dataset=str(tmp_path / "set"), split=(0.5, 0.5, 0))
    assert load_data(config).test is None
    data = load_data(config, test=True)
    with pytest.raises(DataError, match="its label is missing"):
        check_labels(data.test, "test", data.name)


def test_hidden_files_are_no_data_and_split_folders_no_classes(image_folder):
    hidden = image_folder / "dark" / ".checkpoints"
    hidden.mkdir()
    (hidden / "1.png").write_bytes(b"no picture")
    (image_folder / "dark" / "._0.png").write_bytes(b"no picture")
    assert len(load_data(make_config(train_data_dir=str(image_folder))).train.source.paths) == 16
    (image_folder / "empty").mkdir()
    with pytest.raises(DataError, match="class folder 'empty' holds no images"):
        load_data(make_config(train_data_dir=str(image_folder)))
    (image_folder / "empty").rmdir()
    (image_folder / "dark").rename(image_folder / "val")
    (image_folder / "bright").rename(image_folder / "train")
    with pytest.raises(DataError, match=r"the subfolders are splits \(train, val\)"):
        load_data(make_config(train_data_dir=str(image_folder)))


def test_channels_that_the_data_have_not_are_refused():
    with pytest.raises(ConfigError, match="--channels 3, but the images of digits have 1"):
        load_data(make_config(channels=3))


def test_random_erasing_blackens_parts_of_training_images():
    data = load_data(make_config())
    plain, erased = (
        torch.cat([batch["images_BCHW"] for batch in read(train_loader(config, data))])
        for config in (make_config(augment="none", num_workers=0, random_erasing=share) for share in (0.0, 1.0))
    )
    assert (plain != erased).flatten(1).any(1).float().mean() > 0.5
    assert (erased[plain != erased] == 0).all()


def test_a_folder_that_only_bears_the_name_of_a_known_dataset_takes_nothing_from_its_row(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pictures = [Image.new("RGB", (40, 40))] * 20
    table = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 10}, features=features)
    table.save_to_disk(tmp_path / "cifar10")
    data = load_data(make_config(dataset=str(tmp_path / "cifar10")))
    assert (data.image_size, data.info.mean) == (40, IMAGENET_MEAN)


def test_small_pictures_are_shifted_as_far_as_padded_and_half_of_them_flipped():
    count = 18_000
    pixels = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    pixels[:, :, 1, 1] = 1
    moved = Geometry("whole", 4, padding=1, flip=True).move(pixels, mix_ids(0, ids=np.arange(count)))
    # rows 0 to 2 alike; columns 0 to 2 alike, or 3 to 1 where flipped
    shares = np.outer([1 / 3, 1 / 3, 1 / 3, 0], [1 / 6, 1 / 3, 1 / 3, 1 / 6])
    assert moved[:, 0].float().mean(0).numpy() == pytest.approx(shares, abs=0.01)


def test_small_pictures_in_memory_and_in_files_are_augmented_alike():
    digits = load_digits()
    dataset = ImageDataset(digits, Transform(Geometry("whole", 8, padding=1, flip=True)), digits.kind, 1)
    draw = Draw(np.arange(50), mix_ids(0, ids=np.arange(50)))
    rows = Rows([encoded(digits, place) for place in range(50)], digits.labels[:50])
    memory, files = (dataset.__getitems__(one)["images_BCHW"] for one in (draw, draw._replace(rows=rows)))
    assert torch.equal(memory, files)


def test_random_crops_cover_the_picture_and_half_of_them_are_flipped():
    keys = mix_ids(0, ids=np.arange(4000)).tolist()
    boxes = np.array([random_box(key, 100, 100) for key in keys])
    areas, aspects = boxes[:, 2] * boxes[:, 3] / 1e4, boxes[:, 3] / boxes[:, 2]
    assert 0.075 < areas.min() < 0.1 and areas.max() > 0.95
    assert 0.7 < aspects.min() < 0.78 and 1.28 < aspects.max() < 1.43
    tops = np.array([box[0] for box in (random_box(key, 12, 12) for key in keys) if box[2] == 11])
    assert np.bincount(tops) / len(tops) == pytest.approx([0.5, 0.5], abs=0.1)
    picture = torch.arange(100 * 100).reshape(1, 100, 100) % 251
    transform = Transform(Geometry("random", 16, flip=True))
    plain = Transform(Geometry("random", 16))
    pairs = [[one.cut(picture.byte(), key, 1) for one in (transform, plain)] for key in keys[:400]]
    flipped = [not torch.equal(ours, as_it_is) for ours, as_it_is in pairs]
    assert np.mean(flipped) == pytest.approx(0.5, abs=0.1)
    assert all(
        torch.equal(ours, as_it_is.flip(2) if turned else as_it_is) for (ours, as_it_is), turned in zip(pairs, flipped)
    )


def test_a_picture_too_long_for_a_crop_gives_the_largest_of_an_allowed_aspect_from_its_middle():
    assert random_box(1, 3, 400) == Box(0, 198, 3, 4)
    assert random_box(1, 400, 3) == Box(198, 0, 4, 3)


def test_evaluation_cuts_seven_eighths_from_the_middle():
    assert centre(256, 300) == Box(16, 38, 224, 224)


def test_digits_are_not_flipped_and_evaluation_leaves_pictures_as_they_are():
    data = load_data(make_config())
    assert not train_loader(make_config(num_workers=0), data).dataset.transform.geometry.flip
    digits = load_digits().images_NCHW
    for batch in eval_loader(make_config(num_workers=0), data.val, data.image_size):
        assert torch.equal(batch["images_BCHW"], digits[batch["ids"]])


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_validation_split_that_is_given_is_validated_on(tmp_path, name):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    tables = {
        part: datasets.Dataset.from_dict(
            {"image": [Image.new("L", (4, 4))] * size, "label": [0, 1] * (size // 2)}, features=features
        )
        for part, size in (("train", 8), (name, 6), ("test", 4))
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "set")
    data = load_data(make_config(dataset=str(tmp_path / "set")), test=True)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 6, 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 123456789012], "2 different numbers up to 123,456,789,012"),
        ([0.5, 1.5], "no class labels"),
        ([[0, 1], [1, 0]], "no class labels"),
        ([[0], [1, 0]], "no class labels"),
        ([None, None], "no class labels"),
    ],
)
def test_a_column_that_holds_no_classes_is_refused(values, words):
    table = datasets.Dataset.from_dict({"label": values})
    with pytest.raises(DataError, match=words):
        classes_of(table.features["label"], values_of(table, "label"), "label", "x")


@pytest.mark.parametrize(
    ("values", "classes", "numbers"),
    [
        ([2, None, 0], ["0", "1", "2"], [2, -1, 0]),
        (["b", None, "a"], ["a", "b"], [1, -1, 0]),
        ([True, False], ["0", "1"], [1, 0]),
    ],
)
def test_missing_labels_are_no_class(values, classes, numbers):
    table = datasets.Dataset.from_dict({"label": values})
    found = values_of(table, "label")
    assert classes_of(table.features["label"], found, "label", "x") == classes
    assert numbers_of(found, classes, "x").tolist() == numbers


def test_image_cells_hold_bytes_or_a_path(tmp_path):
    (tmp_path / "a.png").write_bytes(b"content")
    for cell in (
        b"content",
        {"bytes": b"content"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        str(tmp_path / "a.png"),
    ):
        assert bytes_of_cell(cell, "x") == b"content"
    for cell in (None, {}, {"bytes": None, "path": None}):
        with pytest.raises(DataError, match="there is no image"):
            bytes_of_cell(cell, "x")
    with pytest.raises(DataError, match="cannot read the file"):
        bytes_of_cell("nowhere.png", "x")


def test_a_table_of_paths_has_another_fingerprint_once_a_file_has_changed(image_folder):
    paths = sorted(map(str, image_folder.rglob("*.png")))
    table = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    source = ArrowSource(table, "image", np.zeros(16, np.int64), "x", 1, ClassLabels(["a"]))
    before, sizes = source.fingerprint(), source.sizes()
    assert sizes.tolist() == [Path(path).stat().st_size for path in paths]
    assert source.fingerprint() == before
    Path(paths[3]).write_bytes(Path(paths[4]).read_bytes())
    assert source.fingerprint() != before
