"""What the processes of a run tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from configs.errors import DataError, UserError
from trainer import signals

PATIENCE = timedelta(hours=12)  # the main process may have much to decode; NCCL's own is ten minutes


def precise(device: torch.device) -> torch.dtype:
    """So many digits that the order of a sum does not show; MPS has no more."""
    return torch.float32 if device.type == "mps" else torch.float64


class Processes:
    """All of them call each method as often, and get the same from it."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.number = accelerator.num_processes
        # The sum of a tensor over all processes; None for one alone.
        self.reduce = (lambda tensor: accelerator.reduce(tensor, "sum")) if self.number > 1 else None
        self.group: Any = None  # talks on the CPU, beside the computation
        self.patient: Any = None
        if self.number > 1:
            self.group = dist.new_group(backend="gloo")
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.words = torch.zeros(0, dtype=torch.int64)
        self.pending: dist.Work | None = None

    def wait(self) -> None:
        """Until all are here."""
        if self.patient is not None:
            dist.barrier(self.patient)

    def wait_at_once(self) -> None:
        """Until all are here; a signal ends the process, since nothing is to be saved yet."""
        with signals.as_usual():
            self.wait()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others begin with this block when the main process is through, and all leave it together."""
        if self.accelerator.is_main_process:
            yield
            self.wait_at_once()
        else:
            self.wait_at_once()
            yield
        self.wait_at_once()

    def from_main(self, work: Callable[[], Any]) -> Any:
        """What the main process's work returns; its error is raised on all, so that none waits for ever."""
        if self.number == 1:
            return work()
        result = error = told = None
        if self.accelerator.is_main_process:
            try:
                result = work()
            except Exception as fault:
                error = fault
                told = fault if isinstance(fault, UserError) else UserError(f"the main process failed: {fault}")
        said = [result, told]
        dist.broadcast_object_list(said, src=0, group=self.patient)
        result, told = said
        if told is not None:
            raise error or told
        return result

    def told_by_all(self, said: Any) -> list[Any]:
        """What each process says, in their order; numbers that are added up so do not depend on how many are."""
        if self.group is None:
            return [said]
        heard: list[Any] = [None] * self.number
        dist.all_gather_object(heard, said, group=self.group)
        return heard

    def in_step(self, items: Iterable[Any], told: Callable[[Any], list[int]] = lambda item: [1]) -> Iterator[Any]:
        """Items of a loader that every process has its own of, while all have one. told: the sizes of its batches that
        have to be equal. Raises DataError on all of them, where they would wait for one another for ever."""
        remaining = iter(items)
        while True:
            item = next(remaining, None)
            sizes = self.told_by_all([] if item is None else told(item))
            if any(others != sizes[0] for others in sizes):
                raise unevenly_shared(sizes)
            if item is None:
                return
            yield item

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows [N, ...] of all processes, one process after the other, however many each has."""
        if self.number == 1:
            return rows
        counts = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padding = rows.new_zeros((max(counts) - len(rows), *rows.shape[1:]))
        parts = self.accelerator.gather(torch.cat([rows, padding])).split(max(counts)) if max(counts) else [rows]
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    def gather_lines(self, lines: list[Any]) -> list[Any]:
        """Those of all processes; as a rule there are none, and one number is all that is exchanged. A process may come
        late from writing a checkpoint."""
        if self.patient is None:
            return lines
        number = torch.tensor(len(lines))
        dist.all_reduce(number, group=self.patient)
        if not number:
            return lines
        return [line for lines in self.told_by_all(lines) for line in lines]

    def exchange(self, *words: int) -> list[int]:
        """The largest of each word that any process said at the call before: all act on it at the same step.

        The words travel on the CPU beside the computation, so that nobody waits. One process alone hears at once.
        """
        if self.group is None:
            return list(words)
        heard = self.hear() or [0] * len(words)
        self.words = torch.tensor(words)
        self.pending = dist.all_reduce(self.words, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return heard

    def hear(self) -> list[int]:
        """What is on its way; [] where nothing is."""
        if self.pending is None:
            return []
        self.pending.wait()
        self.pending = None
        return self.words.tolist()


def unevenly_shared(sizes: list[list[int]]) -> DataError:
    """sizes: of each process's batches."""
    numbers = [len(of_one) for of_one in sizes]
    has, lacks = numbers.index(max(numbers)), numbers.index(min(numbers))
    if has != lacks:
        what = f"process {has} has {numbers[has]} more batch(es) to compute, process {lacks} has {numbers[lacks]}"
        return DataError(what, fix="give every process equally many batches, as data/loader.py does")
    other = next(process for process, of_one in enumerate(sizes) if of_one != sizes[0])
    what = f"process 0 has batches of {sizes[0]} samples to compute, process {other} of {sizes[other]}"
    return DataError(what, fix="give every process equally large batches for this loss, as data/loader.py does")
