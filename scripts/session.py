"""One session of a run: say what it is, train, say what came of it."""

from __future__ import annotations

from configs.options import Config
from data.dataset import Data
from data.order import even_parts
from models.summary import summarize
from scripts.wiring import build_trainer, device_name
from trainer.base_trainer import BaseTrainer

EXIT_CODES = {"done": 0, "preempted": 75}


def run(config: Config) -> int:
    trainer, data, lines = build_trainer(config)
    if trainer.is_main:
        print_summary(trainer, data, lines)
    result = trainer.train()
    if trainer.is_main:
        print_result(trainer, result)
        if config.push_to_hub and result["state"] == "done":
            from scripts.push import push_folder

            print(push_folder(trainer.run.best, str(config.hub_model_id)))
    trainer.accelerator.end_training()
    return EXIT_CODES[result["state"]]


def print_summary(trainer: BaseTrainer, data: Data, lines: list[str]) -> None:
    """One screen: the run, the model, the data, the course of training, the machine."""
    config, accelerator = trainer.config, trainer.accelerator
    micro = even_parts(trainer.batch_share, config.micro_batch_size)
    splits = [("train", data.train), ("validation", data.val), ("test", data.test)]
    sizes = " · ".join(f"{name} {len(split):,}" for name, split in splits if split)
    dropped = len(data.train) % config.batch_size
    length = (
        f"{config.max_steps:,} steps"
        if config.max_steps
        else f"{config.epochs} epochs of {trainer.steps_per_epoch:,} steps"
    )
    accumulated = -(-trainer.batch_share // micro)
    print(f"run       {trainer.run.path}")
    print(f"model     {config.model}: {summarize(trainer.plain_model, data.info.channels, data.image_size, micro)}")
    print(f"data      {data.name}: {sizes}; {len(data.classes)} classes")
    print(f"          {data.info.channels}x{data.image_size}x{data.image_size} pixels, augment {config.augment}")
    print(
        f"training  {length}, batch {config.batch_size} = "
        f"{accelerator.num_processes} process(es) x {accumulated} x {micro}"
        + (f"; {dropped} samples sit out each epoch" if dropped else "")
    )
    print(
        f"          {config.optimizer}, lr {config.lr:g}, {config.scheduler}"
        + (f", ema {config.ema_decay:g}" if trainer.ema else "")
    )
    print(
        f"machine   {device_name(trainer.device)}, precision {accelerator.mixed_precision}, "
        f"{trainer.state.cpu_threads} thread(s)"
    )
    for line in lines:
        print(f"note      {line}")
    print(flush=True)


def print_result(trainer: BaseTrainer, result: dict) -> None:
    """The best epoch, the folder, and what to do next."""
    path, best = trainer.run.path, result["best"]
    print()
    if best:
        print(f"best      {best['metric']} {best['value']:.4f} in epoch {best['epoch'] + 1} (step {best['step']:,})")
    print(f"run       {path}")
    if result["state"] == "preempted":
        print(f"stopped   after step {result['step']:,}, saved; continue with")
        print(f"          accelerate launch scripts/train.py --resume {path}")
        return
    print("next      python scripts/test.py --weights " + str(path))
    print(f"          python scripts/predict.py --weights {path} IMAGE_OR_FOLDER")
    config = trainer.config
    longer = f"--max_steps {config.max_steps * 2}" if config.max_steps else f"--epochs {config.epochs * 2}"
    print(f"          python scripts/train.py --resume {path} {longer}")
