"""Leakage: pictures that two splits have in common, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch

from configs.errors import DataError
from data.decode import channels_of
from data.sequential import SequentialStream
from data.sources import Source
from data.split import Split
from data.stream import Stream

EXAMPLES = 3


@dataclass(frozen=True)
class Duplicates:
    """The pictures of split b that are exact copies of pictures of split a."""

    a: Split
    b: Split
    pairs: list[tuple[int, int]] = field(default_factory=list)  # places in a's and in b's source, one pair a copy in b
    other_label: int = 0  # pairs whose two labels are known and differ
    skipped: str = ""  # why nothing was compared

    def warning(self, name_a: str = "training", name_b: str = "validation") -> str:
        """One line for the user: what was found, or that nothing was compared; "" where all is well."""
        if self.skipped:
            return f"{name_a} and {name_b} images were not searched for common ones: {self.skipped}"
        if not self.pairs:
            return ""
        examples = [f"{self.a.source.name(one)} = {self.b.source.name(two)}" for one, two in self.pairs[:EXAMPLES]]
        if len(self.pairs) == 1:
            what = f"1 {name_b} image is an exact copy of a {name_a} image"
        else:
            what = f"{len(self.pairs):,} {name_b} images are exact copies of {name_a} images"
        labels = f" ({self.other_label:,} with another label)" if self.other_label else ""
        more = ", ..." if len(self.pairs) > EXAMPLES else ""
        return f"{what}{labels}: {', '.join(examples)}{more}: the {name_b} score is too good; remove them"


def duplicates_between(a: Split, b: Split, *, limit_bytes: int = 1 << 30) -> Duplicates:
    """Exact duplicates between two splits, of one source or of two; a copy in b is paired with the first like it in a.

    Only pictures whose size in bytes occurs on both sides are read, and none where these sum up to more than
    limit_bytes: a check must not delay a start. Unreadable pictures are passed over.
    """
    source_a, source_b = a.source, b.source
    if isinstance(source_a, (Stream, SequentialStream)) or isinstance(source_b, (Stream, SequentialStream)):
        return Duplicates(a, b, skipped="they are streamed")
    sizes = picture_sizes(source_a)
    other_sizes = sizes if source_b is source_a else picture_sizes(source_b)
    if sizes is None or other_sizes is None:
        return Duplicates(a, b, skipped="their sizes are not known before they are decoded")
    sizes_a, sizes_b = sizes[a.ids], other_sizes[b.ids]
    common = np.intersect1d(sizes_a, sizes_b)
    common = common[common > 0]  # an empty file is no picture
    in_a, in_b = np.isin(sizes_a, common), np.isin(sizes_b, common)
    total_bytes = int(sizes_a[in_a].sum() + sizes_b[in_b].sum())
    if total_bytes > limit_bytes:
        return Duplicates(
            a,
            b,
            skipped=f"{in_a.sum():,} and {in_b.sum():,} of them are of a size that the others have too, "
            f"{total_bytes / 1e6:,.1f} MB to read, more than {limit_bytes / 1e6:,.1f} MB",
        )
    first_place: dict[bytes, int] = {}
    for key, place in digests(source_a, a.ids[in_a]):
        first_place.setdefault(key, place)
    pairs = [(first_place[key], place) for key, place in digests(source_b, b.ids[in_b]) if key in first_place]
    pairs = [pair for pair in pairs if is_picture(source_b, pair[1])]
    return Duplicates(a, b, pairs, count_other_label(source_a.labels, source_b.labels, pairs))


def picture_sizes(source: Source) -> np.ndarray | None:
    """Bytes of each picture as `read` gives it, int64 [N]; None where it would take decoding to know."""
    sizes = source.sizes()
    if sizes is None and source.in_memory:
        return np.array([bytes_in_memory(source, place) for place in range(len(source.labels))], np.int64)
    return sizes


def bytes_in_memory(source: Source, place: int) -> int:
    try:
        content = source.read(place)
    except DataError:
        return 0
    return len(content) if isinstance(content, bytes) else content.nbytes


def digests(source: Source, places: np.ndarray) -> list[tuple[bytes, int]]:
    """(digest, place) of the pictures that can be read."""
    found = []
    for place in places.tolist():
        try:
            content = source.read(place)
        except DataError:  # reported where it is trained or measured on
            continue
        found.append((digest(content), place))
    return found


def is_picture(source: Source, place: int) -> bool:
    """Whether its header can be read: broken files are often equal, cut off at one length or filled with zeros."""
    content = source.read(place)
    try:
        return not isinstance(content, bytes) or channels_of(content, source.name(place)) > 0
    except DataError:
        return False


def digest(content: bytes | torch.Tensor) -> bytes:
    """A hash of encoded bytes, or of pixels with their shape."""
    if isinstance(content, bytes):
        return blake2b(content, digest_size=16).digest()
    key = blake2b(str(tuple(content.shape)).encode(), digest_size=16, person=b"pixels")
    key.update(np.ascontiguousarray(content.numpy()).data)
    return key.digest()


def count_other_label(labels_a: np.ndarray, labels_b: np.ndarray, pairs: list[tuple[int, int]]) -> int:
    """How many pairs have two class numbers that differ; -1 stands for none, as in published test sets."""
    if not pairs or labels_a.dtype == object or labels_b.dtype == object:
        return 0
    places_a, places_b = np.array(pairs).T
    one, two = labels_a[places_a], labels_b[places_b]
    return int(((one != two) & (one >= 0) & (two >= 0)).sum())
