"""Samples that could not be used: each is named once in bad_samples.jsonl, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from configs.errors import DataError
from trainer.run_folder import RunFolder
from trainer.windows import Batch, as_dict

KEY = "bad_samples"  # of a batch
Line = dict[str, Any]
SEEN_AT_LEAST = 1000  # samples that a share is taken of where a stream does not tell its size
SHOWN = 10


@runtime_checkable
class ReportingLoader(Protocol):
    """A loader that replaces bad samples and lists them as (id, source, reason)."""

    bad: list[Any]
    size: int | None


def taken_from(loader: ReportingLoader) -> list[Any]:
    bad, loader.bad[:] = [*loader.bad], []
    return bad


class BadSamples:
    """What this process met, until `share` tells the others and the run folder."""

    def __init__(self, run: RunFolder, max_fraction: float, gather: Callable[[list[Line]], list[Line]]):
        self.run, self.max_fraction, self.gather = run, max_fraction, gather
        self.met: list[Line] = []
        self.lines: dict[tuple[str, int], Line] = {}
        self.sizes: dict[str, int | None] = {}

    def remember(self) -> None:
        """Those that the run had met before it was continued."""
        file = self.run.path / "bad_samples.jsonl"
        for text in file.read_text().splitlines() if file.is_file() else ():
            line = json.loads(text)
            self.lines[line["split"], line["id"]] = line

    def attached(self, loader: Any, batches: Iterable[Any]) -> Iterable[Any]:
        """The loader's training batches, each with what it met on the way to it, for `detach`: with CUDA one is fetched
        while the one before is computed on."""
        if not isinstance(loader, ReportingLoader):
            return batches
        self.sizes["train"] = loader.size
        return (as_dict(batch) | {KEY: taken_from(loader)} for batch in batches)

    def detach(self, batches: list[Batch], step: int) -> None:
        """Note what came with the batches of a step."""
        self.note("train", [one for batch in batches for one in batch.pop(KEY, ())], step)

    def collect(self, split: str, loader: Any, step: int) -> None:
        """Note what a loader has met since it was last asked."""
        if isinstance(loader, ReportingLoader):
            self.sizes[split] = loader.size
            self.note(split, taken_from(loader), step)

    def note(self, split: str, bad: list[Any], step: int) -> None:
        """Keep these (id, source, reason) until they are shared, unless they are known."""
        for place, source, reason in bad:
            if (split, place) not in self.lines:
                self.met.append({"split": split, "step": step, "id": place, "source": source, "reason": reason})

    def share(self, samples_seen: int) -> None:
        """Write down the new ones of all processes. Raises DataError on all of them where they are too many."""
        met, self.met = self.gather(self.met), []
        for line in sorted(met, key=lambda line: (line["step"], line["id"])):
            if (line["split"], line["id"]) not in self.lines:
                self.lines[line["split"], line["id"]] = line
                self.run.log_bad_sample(line)
        for split, size in self.sizes.items() if met else ():
            bad = [line for line in self.lines.values() if line["split"] == split]
            of = size or max(SEEN_AT_LEAST, samples_seen)
            if len(bad) > self.max_fraction * of:
                named = "".join(f"\n    {line['source']}: {line['reason']}" for line in bad[:SHOWN])
                more = f"\n    and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
                raise DataError(
                    f"{len(bad)} of {of:,} {split} samples cannot be used, more than --max_bad_fraction "
                    f"{self.max_fraction:g}{named}{more}",
                    where=str(self.run.path / "bad_samples.jsonl"),
                    fix="repair or remove them, or allow more with --max_bad_fraction",
                )
