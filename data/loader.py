"""Loaders: an order, a dataset, and processes that decode."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from configs.environment import cores, int_of, is_on
from configs.errors import ConfigError, DataError
from configs.options import Config
from data.balance import rare_classes, repeats
from data.batch_sizes import BatchSizes, check_shares
from data.batches import ImageDataset, PictureDataset
from data.box_dataset import BoxDataset, BoxTransform, eval_box_transform, train_box_transform
from data.dataset import Data
from data.order import Blocks, Draw, EvalOrder, Mixed, Resampled, Samples, Shuffled, TrainOrder
from data.sequential import SequentialEvalOrder, SequentialStream, SequentialTrainOrder
from data.split import Split
from data.stream import Stream
from data.transforms import Transform, eval_transform, train_transform

Order = TrainOrder | EvalOrder | SequentialTrainOrder | SequentialEvalOrder
TRIES = 20  # samples in a row that may be bad before a run gives up
PARENT_SECONDS = 5.0  # between two looks whether the process that trains lives


class BadSample(NamedTuple):
    id: int
    source: str
    reason: str


class Draws:
    """The draws of an order on their way to the loader processes, with the rows of a stream; remembered until their
    batches come back."""

    def __init__(self, order: Order, stream: Stream | None):
        self.order, self.stream = order, stream
        self.sent: deque[Draw] = deque()

    def __iter__(self) -> Iterator[Draw]:
        self.sent.clear()
        for draw in self.order:
            if self.stream is not None:
                self.stream.fetch_ahead(draw.ahead() if draw.ahead else self.stream.blocks_from(draw.ids))
                draw = draw._replace(rows=self.stream.rows(draw.ids))
            self.sent.append(draw._replace(rows=None))
            yield draw._replace(spare=None, ahead=None)


class OrderedLoader:
    """The micro-batches of an order. For training, `set_position` says where the next epoch begins.

    A bad sample never comes out: in training the next one of the order that is not bad stands in for it, under its
    key; in evaluation it is left out. `bad` lists them as they are met.
    """

    def __init__(self, dataset: PictureDataset, order: Order, num_workers: int, stream: Any, size: int | None):
        self.dataset, self.order, self.stream, self.size = dataset, order, stream, size
        self.bad: list[BadSample] = []
        self.draws = Draws(order, stream if isinstance(stream, Stream) else None)
        self.loader = DataLoader(
            dataset,
            batch_sampler=self.draws,  # type: ignore[arg-type]  # of Draws, which the dataset's __getitems__ takes
            collate_fn=as_it_is,
            num_workers=num_workers,
            worker_init_fn=partial(outlive_a_signal, os.getpid(), multiprocessing.get_start_method() == "fork"),
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available() and not is_on("ACCELERATE_USE_CPU"),
            generator=torch.Generator(),  # the loader's own seed is not used: keep it from the global generator
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch (training), or micro-batches (evaluation)."""
        order = self.order
        return order.steps_per_epoch if isinstance(order, (TrainOrder, SequentialTrainOrder)) else len(order)  # type: ignore[arg-type]

    def set_position(self, epoch: int, step_in_epoch: int) -> None:
        """Let the next iteration begin at this step. Nothing is decoded for what is skipped."""
        assert isinstance(self.order, (TrainOrder, SequentialTrainOrder)), "an evaluation has no epochs"
        self.order.move_to(epoch, step_in_epoch)

    def steps_of(self, epoch: int) -> int:
        """Optimizer steps of a training epoch."""
        return self.order.steps_of(epoch) if isinstance(self.order, TrainOrder) else self.steps_per_epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.loader)
        while True:
            try:
                batch = self.whole(next(batches))
            except StopIteration:
                return
            except DataError as error:
                error.of_one_process = True
                raise
            yield batch

    def whole(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch, its bad samples replaced or left out."""
        draw = self.draws.sent.popleft()
        faults = batch.pop("faults", [])
        if faults and draw.spare is None:
            return self.without(batch, faults)
        if faults:
            self.replace(batch, faults, draw)
        return batch

    def replace(self, batch: dict[str, Any], faults: list[tuple[int, str]], draw: Draw) -> None:
        """Put the next good samples of the order where the bad ones are."""
        assert draw.spare is not None
        for slot, reason in faults:
            self.note(int(batch["ids"][slot]), reason)
            for attempt in range(1, TRIES + 1):
                spare = draw.spare(slot, attempt)
                if spare.rows is None and self.draws.stream is not None:
                    spare = spare._replace(rows=self.draws.stream.rows(spare.ids))
                one = self.dataset.__getitems__(spare)
                if "faults" not in one:
                    for name, values in one.items():
                        batch[name] = put(batch[name], slot, values)
                    break
                self.note(int(one["ids"][0]), one["faults"][0][1])
            else:
                raise DataError(
                    f"{TRIES + 1} samples in a row cannot be used, the last: {self.bad[-1].reason}",
                    where=self.bad[-1].source,
                    fix="repair or remove the files",
                )

    def without(self, batch: dict[str, Any], faults: list[tuple[int, str]]) -> dict[str, Any]:
        """The batch without its bad samples; a stand-in where none is left."""
        for slot, reason in faults:
            self.note(int(batch["ids"][slot]), reason)
        bad = [slot for slot, _ in faults]
        good = [slot for slot in range(len(batch["ids"])) if slot not in bad]
        if good:
            return {name: taken(values, good) for name, values in batch.items()}
        return batch | {"valid": torch.zeros(len(batch["ids"]), dtype=torch.bool)}

    def note(self, place: int, reason: str) -> None:
        self.bad.append(BadSample(place, self.stream.name(place), reason))


def taken(values: Any, slots: list[int]) -> Any:
    """Some samples of a batch's entry: of a tensor [B, ...], or a list of B."""
    return values[slots] if isinstance(values, torch.Tensor) else [values[slot] for slot in slots]


def put(values: Any, slot: int, one: Any) -> Any:
    """The entry with another sample in a slot. Where samples have several rows (boxes), those that one lacks are -1."""
    if isinstance(values, torch.Tensor) and values.ndim > 1 and values.shape[1] != one.shape[1]:
        rows = max(values.shape[1], one.shape[1])
        values, one = (padded(entry, rows) for entry in (values, one))
    values[slot] = one[0]
    return values


def padded(entries: torch.Tensor, rows: int) -> torch.Tensor:
    """[B, R, ...] as [B, rows, ...], what is added being -1."""
    missing = entries.new_full((len(entries), rows - entries.shape[1], *entries.shape[2:]), -1)
    return torch.cat([entries, missing], 1)


def outlive_a_signal(parent: int, forked: bool, worker: int) -> None:
    """In a loader process: a signal to the whole group is left to the process that trains, which needs its loaders to
    come to a good end. SIGTERM is obeyed when it comes from there."""
    if hasattr(signal, "sigwaitinfo"):  # not on a Mac
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        threading.Thread(target=obey_parent, args=(parent, forked), daemon=True).start()


def obey_parent(parent: int, forked: bool) -> None:
    """End with it as well. torch's own watch asks who the parent is when the loader begins: too late for one that was
    killed right after the fork."""
    while os.getppid() == parent or not forked:
        told = signal.sigtimedwait((signal.SIGTERM,), PARENT_SECONDS)
        if told and told.si_pid == parent:
            break
    os._exit(0)


def as_it_is(batch: Any) -> Any:
    return batch


def train_loader(config: Config, data: Data, process: int = 0, processes: int = 1) -> OrderedLoader:
    """Endless variety, fixed order. Raises ConfigError or DataError where no global batch can be formed."""
    batch_sizes = BatchSizes.of(config)
    check_shares(batch_sizes, processes)
    split = data.train
    shares: dict[str, Any] = {
        "seed": config.seed,
        "micro_batch_size": config.micro_batch_size,
        "process": process,
        "processes": processes,
    }
    order: TrainOrder | SequentialTrainOrder
    rare_C = None
    if isinstance(split.source, SequentialStream):
        assert config.max_steps is not None, "checked when the stream was opened"
        if batch_sizes.later:
            raise ConfigError("--batch_size_schedule needs to know how long an epoch is, and this stream does not tell")
        order = SequentialTrainOrder(
            split.source, split.part, chunk_rows=config.shuffle_buffer, max_steps=config.max_steps,
            batch_size=config.batch_size, **shares,
        )  # fmt: skip
    else:
        samples = samples_of(config, data)
        if samples.size < (largest := max(batch_sizes.all())):
            raise DataError(
                f"{samples.size} training samples do not fill one global batch of {largest}"
                + (f" on {processes} processes" if processes > 1 else ""),
                where=data.name,
                fix=f"lower --batch_size{'_schedule' if batch_sizes.later else ''} to at most {samples.size}"
                + (" and start fewer processes" if samples.size < processes else ""),
            )
        order = TrainOrder(samples, batch_size=batch_sizes, **shares)
        if config.augment_rare != "none":
            rare_C = rare_classes(split.labels, len(data.classes))
    flip = data.info.horizontal_flip
    if data.kind.name == "boxes":
        return loader(config, split, order, train_box_transform(config, data.image_size, flip, data.info.zoom))
    return loader(config, split, order, train_transform(config, data.image_size, flip, rare_C))


def samples_of(config: Config, data: Data) -> Samples:
    """The order of an epoch: shuffled, by class, by dataset, or in the blocks of a stream."""
    split = data.train
    parts = [split.ids[begin:end] for begin, end in zip(split.cuts, [*split.cuts[1:], None])]
    if isinstance(split.source, Stream):
        stream = split.source
        orders: list[Samples] = [
            Blocks(ids, stream.blocks_of(ids), open_blocks=stream.open_blocks, seed=config.seed) for ids in parts
        ]
    elif config.sampling != "uniform":
        weights = repeats(split.labels, len(data.classes), config.sampling)
        return Resampled(split.ids, weights, split.labels, config.seed)
    elif not config.mix_weights:
        return Shuffled(split.ids, config.seed)
    else:
        orders = [Shuffled(ids, config.seed) for ids in parts]
    shares = config.mix_weights or [order.size for order in orders]
    return Mixed(orders, shares, config.seed) if len(orders) > 1 else orders[0]


def eval_loader(config: Config, split: Split, image_size: int, process: int = 0, processes: int = 1) -> OrderedLoader:
    """Every sample once."""
    order: EvalOrder | SequentialEvalOrder
    shares = {"micro_batch_size": config.micro_batch_size, "process": process, "processes": processes}
    if isinstance(split.source, SequentialStream):
        order = SequentialEvalOrder(split.source, split.part, chunk_rows=config.shuffle_buffer, **shares)
    else:
        ids = split.ids
        if isinstance(split.source, Stream):  # block by block
            ids = ids[np.argsort(split.source.blocks_of(ids), kind="stable")]
        order = EvalOrder(ids, **shares)
    boxes = split.source.kind.name == "boxes"
    return loader(config, split, order, eval_box_transform(image_size) if boxes else eval_transform(image_size))


def loader(config: Config, split: Split, order: Order, transform: Transform | BoxTransform) -> OrderedLoader:
    source = split.source
    streamed = isinstance(source, (Stream, SequentialStream))
    of_pictures = BoxDataset if isinstance(transform, BoxTransform) else ImageDataset
    dataset = of_pictures(
        None if streamed else source,  # type: ignore[arg-type]
        transform,
        source.kind,
        source.channels,
    )
    return OrderedLoader(dataset, order, workers(config, split), source, len(split) if split.counted else None)


def workers(config: Config, split: Split) -> int:
    """Loader processes: none for data in memory, where starting them costs more than they save."""
    if config.num_workers is not None:
        return config.num_workers
    return 0 if split.source.in_memory else max(1, min(8, cores() // int_of("LOCAL_WORLD_SIZE") - 1))
