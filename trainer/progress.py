"""What a person sees while it trains: a bar an epoch in a terminal, plain lines elsewhere, one table line an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

PLAIN_LINE_SECONDS = 30.0


class Clock:
    """Seconds spent in training an epoch, and those of them spent waiting for data."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.end: float | None = None
        self.wait_seconds = 0.0
        self.samples = 0

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, with the wait for each one measured."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.wait_seconds += time.perf_counter() - asked
            yield batch

    def stop(self) -> None:
        """What follows, as an evaluation, is no part of it."""
        self.end = time.perf_counter()

    def speed(self) -> dict[str, float]:
        end = time.perf_counter() if self.end is None else self.end
        seconds = max(1e-9, end - self.start)
        return {"samples_per_second": self.samples / seconds, "data_wait_share": self.wait_seconds / seconds}


class EpochBar:
    """tqdm where someone watches; else a plain line every 30 s; nothing on other processes."""

    def __init__(self, epoch: int, epochs: int | None, steps: int | None, done: int, *, shown: bool):
        self.title = f"epoch {epoch + 1}" + (f"/{epochs}" if epochs else "")
        self.steps, self.done, self.shown = steps, done, shown
        terminal = shown and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=done, desc=self.title, leave=False, unit="step") if terminal else None
        self.last_line = time.perf_counter()

    def step(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.shown and time.perf_counter() - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = time.perf_counter()
            print(f"{self.title}: step {self.done}" + (f" of {self.steps}" if self.steps else ""), flush=True)

    def show(self, values: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Table:
    """One line an epoch, at most 80 characters wide."""

    HEAD = "  epoch  train loss  {0:>11}     val loss  {0:>11}  samples/s  wait"

    def __init__(self, monitor: str, *, shown: bool):
        self.monitor, self.shown, self.begun = monitor, shown, False

    def line(self, epoch: int, results: dict[str, dict[str, float]], speed: dict[str, float], *, best: bool) -> None:
        if not self.shown:
            return
        if not self.begun:
            print(self.HEAD.format(self.monitor.rpartition("/")[2][:11]))
            self.begun = True
        train, val = results["train"], results.get("val", {})
        cells = [train.get("loss"), train.get(self.monitor), val.get("loss"), val.get(self.monitor)]
        shown = "  ".join(f"{cell:11.4f}" if cell is not None else f"{'-':>11}" for cell in cells)
        print(
            f"{epoch + 1:7d} {shown}  {speed['samples_per_second']:9,.0f}  {speed['data_wait_share']:4.0%}"
            + (" *" if best else ""),
            flush=True,
        )
