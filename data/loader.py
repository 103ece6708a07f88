"""Loaders: an order, a dataset, and processes that decode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from configs.errors import ConfigError, DataError, UserError
from configs.options import Config
from data.dataset import Data, ImageDataset, Split
from data.order import EvalOrder, TrainOrder
from data.sources import TensorSource
from data.transforms import eval_transform, train_transform


class OrderedLoader:
    """The micro-batches of an order. For training, `set_position` says where the next epoch begins."""

    def __init__(self, dataset: ImageDataset, order: TrainOrder | EvalOrder, num_workers: int):
        self.order = order
        self.loader = DataLoader(
            dataset,
            batch_sampler=order,  # type: ignore[arg-type]  # yields Draws, which the dataset's __getitems__ takes
            collate_fn=as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader's own seed is not used: keep it from the global generator
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch (training), or micro-batches (evaluation)."""
        return self.order.steps_per_epoch if isinstance(self.order, TrainOrder) else len(self.order)

    def set_position(self, epoch: int, step_in_epoch: int) -> None:
        """Let the next iteration begin at this step. Nothing is read or decoded for what is skipped."""
        assert isinstance(self.order, TrainOrder), "an evaluation has no epochs"
        self.order.epoch, self.order.first_step = epoch, step_in_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def as_it_is(batch: Any) -> Any:
    return batch


def train_loader(config: Config, data: Data, process: int = 0, processes: int = 1) -> OrderedLoader:
    """Endless variety, fixed order. Raises ConfigError or DataError where no global batch can be formed."""
    if config.batch_size % processes:
        raise ConfigError(
            f"--batch_size {config.batch_size} cannot be shared by {processes} processes",
            fix="it is the batch of all processes together: choose a multiple of their number",
        )
    if len(data.train) < config.batch_size:
        raise DataError(
            f"{len(data.train)} training samples do not fill one global batch of {config.batch_size}"
            + (f" on {processes} processes" if processes > 1 else ""),
            where=data.name,
            fix=f"lower --batch_size to at most {len(data.train)}"
            + (" and start fewer processes" if len(data.train) < processes else ""),
        )
    transform = train_transform(config, data.image_size, data.info.horizontal_flip)
    order = TrainOrder(
        data.train.ids,
        seed=config.seed,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        process=process,
        processes=processes,
    )
    return OrderedLoader(ImageDataset(data.train.source, transform), order, workers(config, data.train))


def eval_loader(config: Config, split: Split, image_size: int, process: int = 0, processes: int = 1) -> OrderedLoader:
    """Every sample once."""
    order = EvalOrder(split.ids, micro_batch_size=config.micro_batch_size, process=process, processes=processes)
    source = split.source
    ready = isinstance(source, TensorSource) and source.images_NCHW.shape[2:] == (image_size, image_size)
    dataset = ImageDataset(source, None if ready else eval_transform(image_size))
    return OrderedLoader(dataset, order, workers(config, split))


def workers(config: Config, split: Split) -> int:
    """Loader processes: none for data in memory, where starting them costs more than they save."""
    if config.num_workers is not None:
        return config.num_workers
    return 0 if split.source.in_memory else max(1, min(8, (os.cpu_count() or 2) - 1))
