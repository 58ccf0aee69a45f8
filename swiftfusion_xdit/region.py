"""A window into symmetric memory: what a plan lays out and a transport moves."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """A typed, strided window into a symmetric buffer: one slot, or a part of one.

    ``offset_bytes`` counts from the start of the buffer; ``stride`` is in elements, one per dim,
    and need not be contiguous.

    Raises:
        ValueError: ``stride`` does not fit ``shape``, something is negative, or ``offset_bytes``
            is not a multiple of the element size.
    """

    offset_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.stride):
            raise ValueError(f"region: one stride per dim of shape, got {self}")
        if self.offset_bytes < 0 or min((*self.shape, *self.stride), default=0) < 0:
            raise ValueError(f"region: offset_bytes, shape and stride must be >= 0, got {self}")
        if self.offset_bytes % self.dtype.itemsize:
            raise ValueError(
                f"region: offset_bytes must be a multiple of {self.dtype.itemsize}, the size of "
                f"{self.dtype}, got offset_bytes={self.offset_bytes}"
            )

    @property
    def num_bytes(self) -> int:
        """The bytes of its elements, which is what a put moves; gaps between them not counted."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def end_bytes(self) -> int:
        """One past its last byte in the buffer; 0 if it has none."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset_bytes + (last + 1) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """This window of ``memory`` (uint8, 1-D): a tensor of ``shape`` that shares its storage.

        Raises:
            ValueError: the region ends past the end of ``memory``.
        """
        if self.end_bytes > memory.numel():
            raise ValueError(
                f"region must end within the buffer: ends at byte {self.end_bytes} of "
                f"{memory.numel()} ({self})"
            )
        start = min(self.offset_bytes, self.end_bytes)  # an empty region may lie anywhere
        window = memory[start : self.end_bytes].view(self.dtype)
        return window.as_strided(self.shape, self.stride)
