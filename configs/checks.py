"""What the options of a run may hold, each alone and beside each other; every function raises ConfigError."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.errors import ConfigError
from configs.names import check_texts
from configs.secrets import shown

if TYPE_CHECKING:
    from configs.options import Config

LEAST = {
    1: ("epochs", "max_steps", "batch_size", "micro_batch_size", "decay_epochs", "cpu_threads", "log_every",
        "save_every_steps", "keep_last", "patience", "stop_after_steps", "image_size", "shuffle_buffer",
        "num_classes", "expect_processes"),
    0: ("warmup_steps", "keep_best", "num_workers", "min_delta", "mixup", "cutmix", "weight_decay", "seed",
        "split_seed", "mix_off_epoch", "lr", "label_smoothing", "ema_decay", "random_erasing", "dropout",
        "momentum", "decay_factor", "max_bad_fraction", "max_nonfinite", "swa_start_epoch",
        "distill_weight", "freeze_epochs", "layer_decay"),
}  # fmt: skip
ABOVE_0 = ("save_every_minutes", "grad_clip", "layer_decay", "swa_lr", "distill_temperature")
BELOW_1 = ("label_smoothing", "ema_decay", "dropout", "momentum")
AT_MOST_1 = ("random_erasing", "decay_factor", "max_bad_fraction", "layer_decay", "distill_weight")
CURES = {"layer_decay": "for a head alone: --freeze_epochs", "grad_clip": "leave it out for no clipping"}

OF_DATASETS = ("data_files", "image_column", "label_column", "label_columns")  # of no use with an image folder
OFF_WHILE_STREAMING = {
    "cache": "none", "sampling": "uniform", "augment_rare": "none", "group_column": None, "class_weights": "none",
}  # fmt: skip
NEEDED = {"swa_lr": "swa_start_epoch", "distill_weight": "teacher", "distill_temperature": "teacher"}


def check(config: Config) -> None:
    for name, value in vars(config).items():
        check_texts(name, value)
    check_numbers(config)
    check_data(config)
    check_sampling(config)
    check_training(config)
    check_loss_weights(config.loss_weights)
    check_run(config)


def check_numbers(config: Config) -> None:
    """Each number by itself."""
    for least, names in LEAST.items():
        for name in names:
            value = getattr(config, name)
            if isinstance(value, int) and value >= 2**63:
                raise ConfigError(f"--{name} is too large: it must be a number below 2**63")
            if value is not None and not least <= value < float("inf"):
                raise ConfigError(f"--{name} is {value}: it must be a number from {least} on")
    for name in ABOVE_0:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} is {value}: it must be above 0", fix=CURES.get(name, ""))
    for name in BELOW_1:
        if (getattr(config, name) or 0) >= 1:
            raise ConfigError(f"--{name} is {getattr(config, name)}: it must be less than 1")
    for name in AT_MOST_1:
        if getattr(config, name) > 1:
            raise ConfigError(f"--{name} is {getattr(config, name)}: it must be at most 1")


def check_data(config: Config) -> None:
    """Where the data come from and how they are split."""
    if min(config.split) < 0 or not abs(sum(config.split) - 1) <= 1e-6:
        raise ConfigError(
            f"--split is {' '.join(map(str, config.split))}: three shares from 0 on that sum to 1, "
            f"not {sum(config.split):g}"
        )
    if config.split[0] == 0:
        raise ConfigError("--split leaves no share for training")
    if config.val_data_dir and not config.train_data_dir:
        raise ConfigError("--val_data_dir needs --train_data_dir")
    if config.train_data_dir and (given := [name for name in OF_DATASETS if getattr(config, name)]):
        raise ConfigError(
            f"--{given[0]} belongs to --dataset, and --train_data_dir is used instead of it",
            fix="leave one of them out, or give the folder to --dataset",
        )
    if config.label_column and config.label_columns:
        raise ConfigError("--label_column and --label_columns both name the labels", fix="leave one of them out")
    on = [name for name, off in OFF_WHILE_STREAMING.items() if getattr(config, name) != off]
    if config.streaming and on:
        raise ConfigError(
            f"--{on[0]} {getattr(config, on[0])} needs all data at hand, and --streaming has a part of them",
            fix="leave one of them out",
        )


def check_sampling(config: Config) -> None:
    """How often and beside what a sample comes."""
    sizes = [config.batch_size, *(size for _, size in milestones(config.batch_size_schedule))]
    if (config.mixup or config.cutmix) and any(size % 2 for size in (*sizes, config.micro_batch_size)):
        raise ConfigError(
            f"--mixup and --cutmix pair samples: --batch_size {' and '.join(map(str, sizes))} "
            f"and --micro_batch_size {config.micro_batch_size} must be even"
        )
    weights, datasets = config.mix_weights, 1 + len(config.mix_datasets)
    if weights and (len(weights) != datasets or min(weights) < 0 or not 0 < sum(weights) < float("inf")):
        raise ConfigError(
            f"--mix_weights is {shown(' '.join(map(str, weights)))}, for {datasets} datasets",
            fix="give one for --dataset and one for each of --mix_datasets, from 0 on, not all 0",
        )
    if config.mix_datasets and config.group_column:
        raise ConfigError(
            "--group_column keeps the groups of one dataset apart, and --mix_datasets adds others to the training",
            fix="leave one of them out",
        )
    if weights and config.sampling != "uniform":
        raise ConfigError(f"--sampling {config.sampling} and --mix_weights both say how often a sample comes")
    if config.class_weights != "none" and config.sampling != "uniform":
        raise ConfigError(
            f"--class_weights {config.class_weights} and --sampling {config.sampling} both make up for rare classes",
            fix="leave one of them out",
        )


def check_training(config: Config) -> None:
    """What training begins with, averages and learns from."""
    if config.weights and config.pretrained:
        raise ConfigError(
            "--weights and --pretrained both say what to begin with",
            fix="take --pretrained where the head may differ, --weights where nothing may",
        )
    if config.swa_start_epoch is not None and config.ema_decay:
        raise ConfigError("--ema_decay and --swa_start_epoch both average the weights", fix="leave one of them out")
    for name, needed in NEEDED.items():
        if getattr(config, needed) is None and getattr(config, name) != getattr(type(config), name):
            raise ConfigError(f"--{name} {getattr(config, name)} does nothing without --{needed}")
    if config.teacher and config.task not in (None, "classification"):
        raise ConfigError(
            f"--teacher teaches the probabilities of classes, and --task is {config.task}", fix="leave it out"
        )
    if config.max_steps and config.warmup_steps >= config.max_steps:
        raise ConfigError(
            f"--warmup_steps {config.warmup_steps} must be less than --max_steps {config.max_steps}",
            fix=f"--warmup_steps {config.max_steps // 10}",
        )


def check_run(config: Config) -> None:
    """The run's folder and where its model goes."""
    if config.push_to_hub and not config.hub_model_id:
        raise ConfigError("--push_to_hub needs --hub_model_id", fix="name the repository: --hub_model_id user/name")
    if config.resume not in ("auto", "never") and config.experiment_name:
        raise ConfigError(
            f"--resume {shown(config.resume)} names a run, and so does --experiment_name {config.experiment_name}",
            fix="leave one of them out",
        )


def milestones(words: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """The epochs and sizes of `--batch_size_schedule`."""
    found: list[tuple[int, int]] = []
    for word in words:
        epoch, _, size = word.partition(":")
        if not (epoch.isdecimal() and size.isdecimal() and len(word) < 20 and int(size) > 0):
            raise ConfigError(
                f"--batch_size_schedule has {shown(word)}", fix="give EPOCH:SIZE, whole numbers, for example 30:512"
            )
        if int(epoch) <= (found[-1][0] if found else 0):
            raise ConfigError(f"--batch_size_schedule {shown(' '.join(words))}: its epochs must rise from 1 on")
        found.append((int(epoch), int(size)))
    return tuple(found)


def check_loss_weights(words: tuple[str, ...]) -> None:
    """Either `learnt` or NAME=NUMBER."""
    if words == ("learnt",):
        return
    for word in words:
        name, equals, number = word.rpartition("=")
        try:
            good = bool(name and equals) and 0 <= float(number) < float("inf")
        except ValueError:
            good = False
        if not good:
            raise ConfigError(
                f"--loss_weights has {shown(word)}", fix="give NAME=NUMBER for each task, for example digit=1 ink=0.5"
            )
