"""A small run of every trainer, on one set of pictures with labels of every kind; as a command, one after the other:

torchrun --nproc_per_node 2 tests/tasks.py PICTURES FOLDER FLAGS
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from configs.arguments import parse
from configs.options import Config
from data.embedded import read_digits
from scripts.wiring import TRAINERS, build_trainer
from trainer.base_trainer import BaseTrainer

DIGITS = ("zero", "one", "two")
SIDE, OBJECTS = 24, ((10, 10), (16, 16))  # pixels of a picture, and of a small and a large digit in a scene


@dataclass(frozen=True)
class Task:
    """flags: how it learns from `save_pictures`; metric: what validation must come to after 96 steps (at least
    `trained`), and one batch that is learnt by heart (`by_heart`); more: what else draws numbers or changes the loss,
    where runs are compared."""

    flags: str
    metric: str
    trained: float
    by_heart: float
    more: str = ""


GRID = "--model grid_cnn --label_column"
# By the names of TRAINERS and of the labels that each of them takes.
TASKS = {
    ("classification", "classes"): Task(
        f"{GRID} digit", "accuracy", 0.8, 1, "--dropout 0.2 --mixup 0.2 --class_weights balanced"
    ),
    ("classification", "multi_label"): Task(f"{GRID} tags", "map", 0.95, 1, "--dropout 0.2 --class_weights sqrt"),
    ("classification", "numbers"): Task(f"{GRID} ink", "r2", 0.8, 0.95, "--dropout 0.2"),
    ("detection", "boxes"): Task("--label_column objects --image_column scene", "map50", 0.8, 0.95),
    ("image_text", "captions"): Task("--label_column captions --micro_batch_size 16 --lr 1e-3", "recall_at_1", 0.5, 1),
    ("multitask", "several"): Task(
        f"{GRID}s tags seldom ink", "tags/map", 0.95, 1, "--dropout 0.2 --loss_weights learnt --class_weights sqrt"
    ),
}
NAMES = [(trainer, labels) for trainer in TRAINERS for labels in TRAINERS[trainer].kinds]
COMMON = "--batch_size 16 --micro_batch_size 4 --num_workers 0 --cpu_threads 1 --log_every 4 --lr 2e-3 --warmup_steps 5"


def task_of(trainer: str, labels: str) -> Task:
    if (trainer, labels) not in TASKS:
        raise LookupError(f"{trainer} has no small run for {labels}: add it to TASKS in tests/tasks.py")
    return TASKS[trainer, labels]


def config_of(name: tuple[str, str], pictures: Path, *flags: str) -> Config:
    trainer, labels = name
    own = f"--task {trainer} --labels {labels} {task_of(trainer, labels).flags} --data_files {pictures}"
    return parse(" ".join([COMMON, own, *flags]).split())


def prepared(name: tuple[str, str], pictures: Path, run: Path, *flags: str) -> BaseTrainer:
    """A trainer of TRAINERS with its model and loaders, that will write into the folder `run`."""
    folder = f"--output_dir {run.parent} --experiment_name {run.name}"
    return build_trainer(config_of(name, pictures, *flags, folder))[0]


def placed(digit: np.ndarray, generator: np.random.Generator) -> tuple[Image.Image, list[int]]:
    """A black picture with a digit [S, S] somewhere in it, and where: left, top, width, height."""
    picture, side = np.zeros((SIDE, SIDE), np.uint8), len(digit)
    left, top = (int(edge) for edge in generator.integers(SIDE - side + 1, size=2))
    picture[top : top + side, left : left + side] = digit
    return Image.fromarray(picture), [left, top, side, side]


def save_pictures(file: Path, count: int = 240) -> Path:
    """Parquet: in each image a real digit, faint or bright, somewhere on the left or on the right; in each scene a
    small one or a large one, as its object."""
    from datasets import ClassLabel, Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    generator, (pixels_N88, labels_N) = np.random.default_rng(0), read_digits()
    chosen = np.flatnonzero(labels_N < len(DIGITS))[:count]
    rows = []
    for number, (pixels_88, label) in enumerate(zip(pixels_N88[chosen], labels_N[chosen])):
        large = number % 2
        digit = pixels_88.repeat(2, 0).repeat(2, 1) * generator.uniform(0.4, 1)
        picture, (left, *_) = placed(digit, generator)
        scene, box = placed(np.asarray(Image.fromarray(pixels_88).resize(OBJECTS[large])), generator)
        side, name = "left" if left < (SIDE - len(digit)) / 2 else "right", DIGITS[label]
        rows.append({
            "image": picture,
            "scene": scene,
            "digit": int(label),
            "seldom": int(label) if number % 3 else None,
            "ink": float(np.asarray(picture).mean() / 255),
            "tags": [place for place, true in enumerate((label == 0, digit.max() > 180)) if true],
            "captions": [f"a {name} on the {side}", f"{side}: {name}"],
            "objects": {"bbox": [box], "category": [large]},
        })  # fmt: skip
    classes, sizes = ClassLabel(names=list(DIGITS)), ClassLabel(names=["small", "large"])
    features = Features({
        "image": ImageFeature(), "scene": ImageFeature(), "digit": classes, "seldom": classes, "ink": Value("float32"),
        "tags": List(ClassLabel(names=["round", "bright"])), "captions": List(Value("string")),
        "objects": {"bbox": List(List(Value("float32"), length=4)), "category": List(sizes)},
    })  # fmt: skip
    Dataset.from_list(rows, features=features).to_parquet(file, batch_size=40)
    return file


if __name__ == "__main__":
    for name, task in TASKS.items():  # a trainer that has none fails alone
        prepared(name, Path(sys.argv[1]), Path(sys.argv[2], "-".join(name)), *sys.argv[3:], task.more).train()
