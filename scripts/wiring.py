"""From a config to a model, data and a trainer: the one module that scripts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from configs import model_args
from configs.errors import ConfigError, DataError, nearest
from configs.options import Config
from data.dataset import Data, load_data, with_cache
from data.described import described
from data.kinds import check_kind
from data.labels import Labels
from data.leakage import duplicates_between
from data.loader import eval_loader, train_loader
from data.order import Use, mix, seed_cpu
from data.several import SeveralLabels
from models import BaseModel, ModelError
from models.load import load, load_weights_into
from models.model import build, check_model_args, check_name, input_size
from models.pretrained import begin_from
from models.recompute import recompute_blocks
from models.views import MeanOfViews
from trainer import launch, micro_batch
from trainer.base_trainer import BaseTrainer
from trainer.contrastive_trainer import ContrastiveTrainer
from trainer.detection_trainer import DetectionTrainer
from trainer.device import make_accelerator
from trainer.distillation import distilled
from trainer.main_trainer import MainTrainer
from trainer.multitask_trainer import MultiTaskTrainer
from trainer.processes import Processes

# A task of your own: one line here, one file in trainer/. The first whose labels the data have is the default.
TRAINERS: dict[str, type[BaseTrainer]] = {
    "classification": MainTrainer,
    "detection": DetectionTrainer,
    "image_text": ContrastiveTrainer,
    "multitask": MultiTaskTrainer,
}
# options that need one class a sample
OF_CLASSES = ("mixup", "cutmix", "label_smoothing", "sampling", "augment_rare", "teacher")
OF_KINDS = {"class_weights": ("classes", "multi_label", "several"), "loss_weights": ("several",)}

Adapt = Callable[[type[BaseTrainer]], type[BaseTrainer]]


def check_names(config: Config) -> None:
    """Refuse a task or a model that does not exist before any data are opened."""
    if config.task and config.task not in TRAINERS:
        raise ConfigError(f"--task {config.task} does not exist", fix=nearest(config.task, list(TRAINERS)))
    if config.model:
        check_model(config.model, config)


def check_model(name: str, config: Config) -> None:
    try:
        check_name(name, config.task)
    except ModelError as error:
        raise ConfigError(f"--model {name}: {error}") from None
    try:
        check_model_args(name, model_args.read(config.model_args))
    except ModelError as error:
        raise ConfigError(f"--model_args: {error}") from None


def completed(config: Config, kind: Labels) -> Config:
    """The config with what follows from the labels of the data: the task, its usual model, its metric."""
    task = config.task or next(name for name, trainer in TRAINERS.items() if kind.name in trainer.kinds)
    trainer = TRAINERS[task]
    check_kind(kind, trainer.kinds, task)
    plain = Config()
    if kind.name != "classes" and (given := [n for n in OF_CLASSES if getattr(config, n) != getattr(plain, n)]):
        raise ConfigError(f"--{given[0]} needs one class a sample, and the data have {kind.name}", fix="leave it out")
    for name, kinds in OF_KINDS.items():
        if getattr(config, name) != getattr(plain, name) and kind.name not in kinds:
            raise ConfigError(f"--{name} is of no use where the data have {kind.name}", fix="leave it out")
    if kind.name == "captions" and config.auto_micro_batch:
        raise ConfigError("--auto_micro_batch cuts a batch that the contrastive loss needs whole", fix="leave it out")
    if kind.name == "boxes" and config.auto_micro_batch:
        raise ConfigError(
            "--auto_micro_batch tries images alone, and the memory that a detector needs depends on their boxes",
            fix="give --micro_batch_size, the samples that a process computes at once",
        )
    if kind.name == "boxes" and config.cache != "none":
        raise ConfigError("--cache keeps pictures at another size, whose boxes it does not know", fix="leave it out")
    config = replace(
        config,
        task=task,
        labels=kind.name,  # type: ignore[arg-type]
        model=config.model or trainer.default_model,
    )
    check_model(str(config.model), config)
    return config


def build_data(config: Config, *, shown: bool = True) -> tuple[Config, Data, list[str]]:
    """The config completed, the data at the size that the model can take, and lines that a user should know."""
    data = load_data(config)
    config = completed(config, data.kind)
    assert config.model is not None
    size, notes = input_size(config.model, data.image_size), []
    if size != data.image_size:
        notes.append(f"{config.model} takes no images of {data.image_size} px: they are resized to {size} px")
    check_monitored(config, data)
    if shown and data.val is not None:
        warning = duplicates_between(data.train, data.val).warning()
        notes += [warning] if warning else []
    return config, with_cache(replace(data, image_size=size), config, shown=shown), notes


def check_monitored(config: Config, data: Data) -> None:
    """Refuse to let a task decide that no validation sample has a label for."""
    if not isinstance(data.kind, SeveralLabels) or data.val is None or data.val.streamed:
        return
    deciding = config.monitor.rpartition("/")[0] if config.monitor else next(iter(data.kind.parts))
    if deciding in data.kind.parts and not len(data.kind.known(data.val.labels, deciding)):
        raise DataError(
            f"no validation sample has a label of {deciding}, whose metric decides what is best",
            where=data.name,
            fix=f"--monitor of another of {', '.join(data.kind.parts)}, or another --split_seed",
        )


def build_model(config: Config, data: Data) -> BaseModel:
    """A described model, its weights drawn from the seed or begun from --weights or --pretrained."""
    config = completed(config, data.kind)
    assert config.model is not None and config.task is not None
    seed_cpu(mix(config.seed, Use.WEIGHTS))
    model = built(
        config,
        **data.kind.model_args,
        in_channels=data.info.channels,
        image_size=data.image_size,
        dropout=config.dropout,
        learnt_weights=config.loss_weights == ("learnt",) or None,
    )
    model.describe(
        task=config.task,
        classes=data.classes,
        image_size=data.image_size,
        mean=data.info.mean,
        std=data.info.std,
        horizontal_flip=data.info.horizontal_flip,
        labels=described(data.kind, None if data.train.streamed else data.train.labels, config.class_weights),
    )
    if config.weights:
        load_weights_into(model, config.weights)
    if config.pretrained:
        begin_from(model, config.pretrained)
    if config.gradient_checkpointing:
        recompute_blocks(model, compiled=config.compile)
    return model.double() if config.dtype == "float64" else model


def built(config: Config, **given: Any) -> BaseModel:
    """The model with --model_args. Raises ConfigError where they are no sizes it can be built with."""
    try:
        return build(str(config.model), **given, **model_args.read(config.model_args))
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        if not config.model_args:
            raise
        words = " ".join(config.model_args)
        raise ConfigError(f"--model {config.model} cannot be built with --model_args {words}: {error}") from error


def titled(config: Config) -> str:
    """The model's name with the arguments that are not its own defaults."""
    return " ".join([str(config.model), *config.model_args])


def outline(config: Config, data: Data) -> BaseModel:
    """The model as it was built, to be measured where a process has only parts of the real one."""
    return build_model(replace(config, weights=None, pretrained=None), data)


def load_teacher(teacher: str, config: Config, data: Data) -> BaseModel:
    """Raises ConfigError where it was trained for something else than these data."""
    model = load(teacher)
    channels = len(model.mean_C11)
    if model.task != config.task:
        raise ConfigError(f"--teacher {teacher} was trained for {model.task}, --task is {config.task}")
    if model.classes != data.classes:
        raise ConfigError(
            f"--teacher {teacher} has the {len(model.classes)} classes {listed(model.classes)}, "
            f"the data the {len(data.classes)} classes {listed(data.classes)}",
            fix="give a teacher that was trained for the same classes, in the same order",
        )
    if channels != data.info.channels:
        raise ConfigError(
            f"--teacher {teacher} takes images of {channels} channel(s), the data have {data.info.channels}",
            fix=f"--channels {channels}",
        )
    return model


def listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def build_trainer(config: Config, adapt: Adapt = lambda task: task) -> tuple[BaseTrainer, Data, list[str]]:
    """Everything a run needs, and lines to tell about it. adapt: makes of a task's trainer the one that is used."""
    check_names(config)
    accelerator = make_accelerator(config)
    config = replace(config, mixed_precision=accelerator.mixed_precision)
    launch.check_processes_know_each_other(config, accelerator)
    launch.check_flags(config, accelerator)
    with Processes(accelerator).main_first():  # one process prepares what the others then read
        config, data, notes = build_data(config, shown=accelerator.is_main_process)
    launch.check_same(told_of(data), accelerator)
    model = build_model(config, data)
    assert config.task is not None
    task = TRAINERS[config.task]
    if config.teacher is not None:
        task = distilled(task, load_teacher(config.teacher, config, data).to(accelerator.device))
    if config.auto_micro_batch:
        images = data.info.channels, data.image_size, data.image_size
        found = micro_batch.found_or_recorded(config, model, images, accelerator)
        config = replace(config, micro_batch_size=found, auto_micro_batch=False)
    process, processes = accelerator.process_index, accelerator.num_processes
    trainer = adapt(task)(
        config,
        model,
        train_loader(config, data, process, processes),
        eval_loader(config, data.val, data.image_size, process, processes) if data.val is not None else None,
        accelerator=accelerator,
    )
    return trainer, data, notes


def told_of(data: Data) -> dict[str, Any]:
    """What two machines have in common that have the same data."""
    splits = {"training": data.train, "validation": data.val}
    sizes = {f"the number of {name} samples": len(s) for name, s in splits.items() if s is not None and s.counted}
    return {**sizes, "the list of classes": data.classes}


def look_at_views(trainer: BaseTrainer) -> None:
    """--tta: from here on predictions are the mean over several views of each image."""
    model = trainer.plain_model
    if model.task != "classification":
        raise ConfigError(f"--tta takes the mean of the probabilities of classes, and the model's task is {model.task}")
    trainer.model = MeanOfViews(trainer.model, mirror=model.horizontal_flip)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
