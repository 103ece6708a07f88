"""What a look at a dataset tells before a long run: classes, and pictures that cannot be used."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from configs.errors import DataError
from configs.options import Config
from data.dataset import Data
from data.loader import eval_loader
from data.split import Split
from data.stream import Stream

PICTURES, SECONDS = 500, 15.0  # of each split, whichever is reached first
STREAM_BLOCKS = 10  # a block is read as a whole
NAMED = 5


def classes_found(data: Data, notes: list[str], note: Callable[[str], None]) -> tuple[str, None]:
    """How many samples there are, and of which class most and fewest; `note` takes what is worth a thought."""
    splits = [("train", data.train), ("val", data.val)]
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits if split is not None and split.counted)
    text = f"{data.name}: {sizes or 'a stream of unknown length'}; {data.kind}"
    if data.classes and not data.train.streamed:
        counts_C = data.kind.counts(data.train.labels)
        few, many = int(counts_C.argmin()), int(counts_C.argmax())
        text += f", {counts_C[few]:,} ({data.classes[few]}) to {counts_C[many]:,} ({data.classes[many]})"
        if missing := [data.classes[label] for label in np.flatnonzero(counts_C == 0)]:
            note(f"no training sample is of {', '.join(missing[:NAMED])}{', ...' if len(missing) > NAMED else ''}")
    for line in notes:
        note(line)
    return text, None


def pictures_found(config: Config, data: Data) -> tuple[str, None]:
    """Decode samples from all over both splits. Raises DataError where more are bad than a run would accept."""
    texts, bad, too_many = [], [], False
    for name, split in (("train", data.train), ("val", data.val)):
        if split is not None:
            decoded, faults = decode_some(config, split, data.image_size)
            texts.append(f"{decoded:,}" + (f" of {len(split):,}" if split.counted else "") + f" {name}")
            bad += [f"{source}: {reason}" for source, reason in faults.items()]
            too_many |= len(faults) > config.max_bad_fraction * decoded
    text = f"{', '.join(texts)}: {f'{len(bad)} cannot' if bad else 'all can'} be used"
    named = "".join(f"; {one}" for one in bad[:NAMED]) + ("; ..." if len(bad) > NAMED else "")
    if too_many:
        raise DataError(
            f"{text}, more than --max_bad_fraction {config.max_bad_fraction:g}{named}",
            fix="repair or remove them, or allow more with --max_bad_fraction",
        )
    return text + named, None


def decode_some(config: Config, split: Split, image_size: int) -> tuple[int, dict[str, str]]:
    """How many samples were looked at, and why some of them cannot be used, by their names."""
    begin, seen = time.perf_counter(), 0
    loader = eval_loader(replace(config, micro_batch_size=16), replace(split, ids=spread(split)), image_size)
    for batch in loader:
        seen += len(batch["ids"]) if "valid" not in batch else 0
        if seen + len(loader.bad) >= PICTURES or time.perf_counter() - begin > SECONDS:
            break
    return seen + len(loader.bad), {one.source: one.reason for one in loader.bad}


def spread(split: Split) -> np.ndarray:
    """Ids from all over a split, in an order that is spread at any length; of a stream those of a few blocks."""
    ids = split.ids
    if isinstance(split.source, Stream):
        blocks = split.source.blocks_of(ids)
        chosen = evenly(np.unique(blocks), STREAM_BLOCKS)
        return np.concatenate([evenly(ids[blocks == block], PICTURES // len(chosen)) for block in chosen])
    ids = evenly(ids, PICTURES)
    return ids[np.argsort(np.arange(len(ids)) * 0.618034 % 1)]  # steps of the golden ratio


def evenly(values: np.ndarray, count: int) -> np.ndarray:
    """At most so many of the values, at equal distances."""
    places = np.linspace(0, len(values) - 1, min(count, len(values)))
    return values[np.round(places).astype(np.int64)]
