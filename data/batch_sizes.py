"""The global batch size as a pure function of the epoch: --batch_size, then what --batch_size_schedule says."""

from __future__ import annotations

from typing import NamedTuple

from configs.checks import milestones
from configs.errors import ConfigError
from configs.options import Config


class BatchSizes(NamedTuple):
    """The size of the first epochs, and the others with the epoch that each begins at."""

    first: int
    later: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, config: Config) -> BatchSizes:
        return cls(config.batch_size, milestones(config.batch_size_schedule))

    def at(self, epoch: int) -> int:
        size = self.first
        for start, following in self.later:
            if epoch >= start:
                size = following
        return size

    def all(self) -> list[int]:
        return [self.first, *(size for _, size in self.later)]


def check_shares(batch_sizes: BatchSizes, processes: int) -> None:
    for size in batch_sizes.all():
        if size % processes:
            flag = "--batch_size" if size == batch_sizes.first else "--batch_size_schedule"
            raise ConfigError(
                f"{flag} {size} cannot be shared by {processes} processes",
                fix="it is the batch of all processes together: choose a multiple of their number",
            )
