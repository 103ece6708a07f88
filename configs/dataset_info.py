"""The dataset table: what a dataset's name tells about its pixels and columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of one dataset; mean and std are those of the training split, for pixels scaled to 0..1."""

    hub_id: str | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    classes: int | None = None
    image_size: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    horizontal_flip: bool = True
    zoom: bool = True  # `--augment default` may show pictures with boxes larger and smaller than they are
    labels: str | None = None  # of data/kinds.py; None: from the columns

    @property
    def channels(self) -> int:
        return len(self.mean)


DATASETS = {
    "digits": DatasetInfo(None, (0.305,), (0.376,), 10, 8, horizontal_flip=False),
    "digit_captions": DatasetInfo(None, (0.075,), (0.228,), None, 24, horizontal_flip=False, labels="captions"),
    "digit_ink": DatasetInfo(None, (0.305,), (0.376,), None, 8, horizontal_flip=False, labels="several"),
    "digit_scenes": DatasetInfo(None, (0.099,), (0.235,), 10, 64, horizontal_flip=False, zoom=False, labels="boxes"),
    "mnist": DatasetInfo("ylecun/mnist", (0.1307,), (0.3081,), 10, 28, "image", "label", False),
    "fashion_mnist": DatasetInfo("zalando-datasets/fashion_mnist", (0.2860,), (0.3530,), 10, 28, "image", "label"),
    "cifar10": DatasetInfo(
        "uoft-cs/cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10, 32, "img", "label"
    ),
    "cifar100": DatasetInfo(
        "uoft-cs/cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 100, 32, "img", "fine_label"
    ),
    "imagenet": DatasetInfo("ILSVRC/imagenet-1k", IMAGENET_MEAN, IMAGENET_STD, 1000, 224, "image", "label"),
}


def find_dataset_info(name: str) -> DatasetInfo | None:
    """The table's row for a dataset's name, its hub id, or a local folder that ends with its name."""
    for key, info in DATASETS.items():
        if name in (key, info.hub_id) or PurePath(name).name == key:
            return info
    return None
