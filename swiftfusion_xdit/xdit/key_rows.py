"""Which of a rank's key rows take part in attention.

Padding must not, and rows that every rank holds alike must take part once. Chunks may have any
lengths, so a rank simply brings fewer key rows than query rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class KeyRows:
    """Of keys with ``num_rows`` local rows those in ``kept``, ``(start, stop)`` in order.

    ``total`` are numbers that every rank has alike and that the kept rows of all ranks follow from.
    """

    num_rows: int
    kept: Ranges
    total: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, num_rows: int, kept: Sequence[tuple[int, int]], *, total: Sequence[int] = ()
    ) -> KeyRows:
        """Without empty ranges, and with neighbours joined.

        Raises:
            ValueError: a range is out of bounds or out of order.
        """
        joined: list[tuple[int, int]] = []
        end = 0
        for start, stop in kept:
            if not end <= start <= stop <= num_rows:
                raise ValueError(
                    f"kept rows must be ranges in order within {num_rows} rows, got {list(kept)}"
                )
            end = stop
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            elif start < stop:
                joined.append((start, stop))
        return cls(num_rows, tuple(joined), tuple(total))

    def select(self, rows: Tensor) -> Tensor:
        """The kept rows of ``[b, h, s, d]``: a view where they are one range."""
        if len(self.kept) == 1:
            start, stop = self.kept[0]
            return rows[:, :, start:stop]
        if not self.kept:
            return rows[:, :, :0]
        return torch.cat([rows[:, :, start:stop] for start, stop in self.kept], dim=2)


def share(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """This rank's even share, ``(start, stop)``, of rows that all ranks hold alike.

    Shares may differ by one row.
    """
    return num_rows * rank // size, num_rows * (rank + 1) // size


def valid_rows(num_rows: int, chunk: int, chunk_rows: int) -> tuple[int, int]:
    """The rows of a chunk, ``(start, stop)`` within it, that lie among the first ``num_rows``.

    Args:
        num_rows: how many rows of the whole sequence are valid; what follows is padding.
        chunk: which chunk; all have ``chunk_rows`` rows.
    """
    return 0, min(max(num_rows - chunk * chunk_rows, 0), chunk_rows)


def within(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The parts of ``ranges`` that lie in ``start .. stop``, counted from ``start``."""
    cut = ((max(a, start) - start, min(b, stop) - start) for a, b in ranges)
    return tuple((a, b) for a, b in cut if a < b)
