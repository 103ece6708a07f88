"""How often classes and datasets come, and what rare classes get."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs.arguments import make_config
from configs.errors import ConfigError, DataError
from data.balance import effective_counts, rare_classes, repeats
from data.dataset import load_data
from data.loader import train_loader
from data.sources import TensorSource
from data.split import Split, with_more
from data.whole import joined
from tests.conftest import run_script

COUNTS = (80, 20, 5)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> str:
    """80 dark, 20 grey and 5 bright pictures, from 21 patients of five pictures each."""
    folder = tmp_path_factory.mktemp("uneven")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["dark", "grey", "bright"]),
            "patient": datasets.Value("string"),
        }
    )
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    pictures = [Image.new("L", (8, 8), 100 * label + place % 50) for place, label in enumerate(labels)]
    columns = {"image": pictures, "label": labels, "patient": [f"p{place // 5}" for place in range(len(labels))]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "uneven")
    return str(folder / "uneven")


def test_weights_balance_the_classes_or_raise_the_rare_ones_by_a_root():
    labels = np.repeat(np.arange(4), (80, 20, 5, 0))  # a class without samples changes nothing
    balanced = repeats(labels, 4, "balanced")
    assert effective_counts(labels, balanced, 4) == pytest.approx([35, 35, 35, 0])
    raised = repeats(labels, 4, "repeat_factor")
    assert raised[[0, 80, 100]] == pytest.approx([1, np.sqrt(105 / 3 / 20), np.sqrt(105 / 3 / 5)])
    assert rare_classes(labels, 4).tolist() == [False, False, True, True]


def labels_of_epoch(loader, epoch: int) -> tuple[list[int], list[int], list[torch.Tensor]]:
    loader.set_position(epoch, 0)
    batches = [{name: value.clone() for name, value in batch.items()} for batch in loader]
    labels, ids = ([number for batch in batches for number in batch[name].tolist()] for name in ("labels", "ids"))
    return labels, ids, [image for batch in batches for image in batch["images_BCHW"]]


def test_balanced_sampling_shows_every_class_as_often_and_repeats_look_different(uneven):
    config = make_config(dataset=uneven, sampling="balanced", batch_size=15, num_workers=0, split=(1.0, 0.0, 0.0))
    loader = train_loader(config, load_data(config))
    for epoch in range(3):
        labels, ids, images = labels_of_epoch(loader, epoch)
        assert np.bincount(labels).tolist() == pytest.approx([35, 35, 35], abs=1)
        bright = [image for label, image in zip(labels, images) if label == 2]
        assert len({bytes(image.numpy()) for image in bright}) > 15  # 5 pictures, 7 times each
        assert len(set(ids)) > 50
    seen = {number for epoch in range(12) for number in labels_of_epoch(loader, epoch)[1]}
    assert len(seen) == 105  # those of a large class come by turns


def test_repeat_factor_leaves_no_sample_out(uneven):
    config = make_config(dataset=uneven, sampling="repeat_factor", batch_size=1, num_workers=0, split=(1.0, 0.0, 0.0))
    _, ids, _ = labels_of_epoch(train_loader(config, load_data(config)), 0)
    assert len(set(ids)) == 105
    expected = 80 + 20 * np.sqrt(105 / 3 / 20) + 5 * np.sqrt(105 / 3 / 5)
    assert len(ids) == round(expected)


def test_only_rare_classes_get_the_stronger_augmentation(uneven):
    options = {"dataset": uneven, "batch_size": 15, "num_workers": 0, "split": (1.0, 0.0, 0.0), "augment": "none"}
    plain, strong = (make_config(**options, augment_rare=policy) for policy in ("none", "trivialaugment"))
    data = load_data(plain)
    (labels, ids, before), (_, same_ids, after) = (labels_of_epoch(train_loader(c, data), 0) for c in (plain, strong))
    assert ids == same_ids
    changed = np.array([not torch.equal(one, other) for one, other in zip(before, after)])
    rare = np.array(labels) == 2
    assert changed[rare].any() and not changed[~rare].any()


def test_groups_stay_together(uneven):
    data = load_data(make_config(dataset=uneven, group_column="patient", split=(0.6, 0.2, 0.2)), test=True)
    patients = [{int(place) // 5 for place in split.ids} for split in (data.train, data.val, data.test)]
    assert not patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2]
    assert sum(map(len, patients)) == 21
    with pytest.raises(DataError, match="no column 'patent'") as error:
        load_data(make_config(dataset=uneven, group_column="patent"))
    assert "patient" in str(error.value)
    with pytest.raises(ConfigError, match="--group_column names a column"):
        load_data(make_config(group_column="patient"))
    with pytest.raises(ConfigError, match="--mix_datasets adds others"):
        make_config(dataset=uneven, group_column="patient", mix_datasets=(uneven,))


def test_groups_that_given_splits_share_are_named(uneven, tmp_path):
    rows = datasets.load_from_disk(uneven)
    given = datasets.DatasetDict(train=rows.select(range(7)), validation=rows.select(range(6, 40)))
    given.save_to_disk(str(tmp_path / "shared"))
    with pytest.raises(DataError, match="patient are in both the training and the val split") as error:
        load_data(make_config(dataset=str(tmp_path / "shared"), group_column="patient"))
    assert rows[6]["patient"] in str(error.value)


def test_a_group_that_is_missing_is_told_with_its_dataset(uneven, tmp_path):
    rows = datasets.load_from_disk(uneven)
    rows.map(lambda row: {"patient": None}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError) as error:
        load_data(make_config(dataset=str(tmp_path / "none"), group_column="patient"))
    assert error.value.where == f"{tmp_path / 'none'}, column patient"


def test_mixed_datasets_have_one_source_and_one_cache(uneven):
    data = load_data(make_config(dataset=uneven, mix_datasets=(uneven,)))
    assert data.val is not None and data.val.source is data.train.source
    assert data.train.source.origin == f"{uneven} (train) and {uneven} (train)"
    assert not set(data.val.ids) & set(data.train.ids)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_are_mixed_by_weight_and_validated_on_the_first(uneven, tmp_path, streaming):
    other = datasets.load_from_disk(uneven).select(range(60, 105))
    other.save_to_disk(tmp_path / "other")
    options = {"dataset": uneven, "mix_datasets": (str(tmp_path / "other"),), "streaming": streaming}
    config = make_config(**options, mix_weights=(0.25, 0.75), batch_size=8, num_workers=0, split=(0.8, 0.2, 0.0))
    data = load_data(config)
    assert data.val.ids.max() < 105
    labels, ids, images = labels_of_epoch(train_loader(config, data), 0)
    share = (np.array(ids) >= 105).mean()
    assert share == pytest.approx(0.75, abs=0.06)
    assert not set(ids) & set(data.val.ids.tolist())
    for label, image in zip(labels, images):
        assert int(image.max()) // 100 == label or int(image.max()) == 0
    other.cast_column("label", datasets.ClassLabel(names=["x", "y", "z"])).save_to_disk(tmp_path / "strange")
    with pytest.raises(DataError, match=r"its 3 classes \(x, y, z\) are not the 3 of the first"):
        load_data(make_config(dataset=uneven, mix_datasets=(str(tmp_path / "strange"),), streaming=streaming))


def test_the_summary_tells_effective_counts_and_copies_between_splits(uneven, tmp_path):
    flags = ["--dataset", uneven, "--output_dir", tmp_path, "--max_steps", "1", "--batch_size", "8", "--split"]
    said = run_script(
        "train.py", *flags, "0.8", "0.2", "0", "--sampling", "balanced", "--augment_rare", "randaugment"
    ).stdout
    assert "balanced: bright 4 come 28 times, dark 64 come 28 times an epoch of 84" in said
    assert "randaugment for 1 rare classes: bright" in said
    assert "exact cop" in said  # the 50 shades of the 80 dark pictures repeat


def test_three_datasets_lie_one_after_the_other():
    one, two, three = (
        TensorSource(torch.full((size, 1, 2, 2), size, dtype=torch.uint8), np.arange(size) % 2, ["a", "b"])
        for size in (4, 6, 8)
    )
    split = with_more(Split(one, np.array([0, 2, 3])), joined([one, two, three]), [6, 8])
    assert (split.ids.tolist(), split.cuts) == ([0, 2, 3, *range(4, 18)], (0, 3, 9))
    begins = [split.ids[cut] for cut in split.cuts]
    assert [int(split.source.read(place)[0, 0, 0]) for place in begins] == [4, 6, 8]
