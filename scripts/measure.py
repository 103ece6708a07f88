"""Metrics of trained weights on one split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import models
from configs.errors import ConfigError, DataError
from configs.options import Config
from data.boxes import BoxLabels
from data.dataset import check_labels, load_data
from data.folders import open_folder
from data.kinds import check_kind
from data.labels import ClassLabels
from data.leakage import duplicates_between
from data.loader import eval_loader
from data.sources import FolderSource
from data.split import Split
from data.whole import whole
from models.clip import CLIP
from models.zero_shot import ZeroShot
from scripts.wiring import TRAINERS, look_at_views
from trainer.device import make_accelerator


def measure(
    config: Config,
    weights: str,
    part: str,
    prompts: Sequence[str] = (),
    class_names: Sequence[str] = (),
    *,
    tta: bool = False,
) -> dict[str, float] | None:
    """Metrics on the main process, None on the others. The model's config.json says how to feed it.

    prompts: texts with {} for a class, by which a model of captions tells classes; class_names: their words.
    """
    model = models.load(weights)
    if prompts:
        config = replace(config, labels="classes", monitor=None)
        model = zero_shot(config, model, part, prompts, class_names)
    accelerator = make_accelerator(config)
    split = open_split(config, model, part)
    # the weights are what best/ and ema.safetensors hold: averaged already; and no run is continued here
    plain = replace(
        config, ema_decay=0.0, swa_start_epoch=None, swa_lr=None, experiment_name=None, resume="auto", compile=False,
        optimizer="adamw",
    )  # fmt: skip
    trainer = TRAINERS[model.task](plain, model, accelerator=accelerator)
    if tta:
        look_at_views(trainer)
    size = model.image_size or config.image_size or 224
    loader = eval_loader(config, split, size, accelerator.process_index, accelerator.num_processes)
    metrics = trainer.validate_epoch(loader)
    bad = trainer.processes.gather_lines([one._asdict() for one in loader.bad])
    if not accelerator.is_main_process:
        return None
    reasons = {one["source"]: one["reason"] for one in bad}
    for source, reason in list(reasons.items())[:10]:
        print(f"left out  {source}: {reason}")
    return metrics | ({"samples": len(split) - len(reasons)} if split.counted else {})


def zero_shot(
    config: Config, model: models.BaseModel, part: str, prompts: Sequence[str], class_names: Sequence[str]
) -> ZeroShot:
    """A classifier of the classes that the data have. Raises ConfigError where that cannot be had."""
    if not isinstance(model, CLIP):
        raise ConfigError(f"--prompts needs a model of captions, and {model.name} is none")
    if wrong := [prompt for prompt in prompts if "{}" not in prompt]:
        raise ConfigError(f"--prompts {wrong[0]!r} has no {{}} for the class", fix="for example 'a photo of a {}'")
    if part == "test" and config.test_data_dir:
        classes = FolderSource(Path(config.test_data_dir)).kind.classes
    else:
        classes = load_data(replace(config, channels=1 if len(model.mean_C11) == 1 else 3), test=part == "test").classes
    if class_names and len(class_names) != len(classes):
        raise ConfigError(f"--class_names are {len(class_names)}, and the data have {len(classes)} classes")
    return ZeroShot(model, classes, list(class_names) or classes, list(prompts))


def open_split(config: Config, model: models.BaseModel, part: str) -> Split:
    """The split to measure on. Raises DataError where there is none, or where its classes are not the model's."""
    config = replace(config, channels=1 if len(model.mean_C11) == 1 else 3)
    if part == "test" and config.test_data_dir:
        kind = BoxLabels if "boxes" in TRAINERS[model.task].kinds else ClassLabels
        like = kind(model.classes) if model.classes else None
        own = whole(open_folder(Path(config.test_data_dir), config.channels, like))
        check_kind(own.source.kind, TRAINERS[model.task].kinds, model.task)
        if config.train_data_dir and Path(config.train_data_dir).is_dir():  # it may have stayed on another machine
            show_copies(whole(open_folder(Path(config.train_data_dir), config.channels)), own)
        return own
    data = load_data(config, test=part == "test")
    check_kind(data.kind, TRAINERS[model.task].kinds, model.task)
    if data.classes != model.classes:
        raise DataError(
            f"the data have the classes {', '.join(data.classes[:5])} ..., "
            f"the model {', '.join(model.classes[:5])} ...",
            where=data.name,
            fix="give the data that the model was trained for",
        )
    split = {"train": data.train, "val": data.val, "test": data.test}[part]
    if split is None:
        raise DataError(
            f"there is no {part} split", where=data.name, fix="give --test_data_dir DIR, or measure --on val"
        )
    if not split.streamed:
        check_labels(split, part, data.name)
    if part == "test":
        show_copies(data.train, split)
    return split


def show_copies(train: Split, test: Split) -> None:
    """Tell what the two splits have in common; a test split that was cut out of a stream shares no row with it."""
    if warning := duplicates_between(train, test).warning("training", "test"):
        print(f"note      {warning}")
