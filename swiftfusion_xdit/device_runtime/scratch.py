"""Where the outputs of a program's calls lie: behind the slots, the same in every layer.

Layers of a plan follow one another, so they share it. It is not torch's memory: what a layer keeps
from one call to the next must not lie in a pool that belongs to a CUDA graph being recorded.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch

from swiftfusion_xdit.plan import ALIGNMENT_BYTES, Plan
from swiftfusion_xdit.schedule.steps import Attend, Merge

Key = tuple[str, Hashable]  # out or lse of an Attend step, or merged (query chunk, head group)


@dataclass(frozen=True)
class Place:
    """A contiguous array; ``offset_bytes`` is counted from the first byte behind the slots."""

    offset_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def places(plan: Plan, rank: int) -> dict[Key, Place]:
    """What one rank's calls store, each in a place of its own."""
    found: dict[Key, Place] = {}
    end = 0
    for key, shape, dtype in _arrays(plan, rank):
        place = found[key] = Place(end, shape, dtype)
        end += -(-place.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return found


def num_bytes(plan: Plan) -> int:
    """The most that any rank needs."""
    ends = [
        place.offset_bytes + place.num_bytes
        for rank in range(plan.mesh.size)
        for place in places(plan, rank).values()
    ]
    return max(ends, default=0)


def output_shape(plan: Plan, chunks: tuple[int, ...], heads: int) -> tuple[int, int, int, int]:
    """``[B, S, H, D]`` of the output rows of some chunks, for a head group."""
    shape = plan.shape
    rows = sum(shape.query_lengths[chunk] for chunk in chunks)
    return (shape.batch, rows, len(plan.heads("o", heads)), shape.head_dim)


def _arrays(plan: Plan, rank: int) -> Iterator[tuple[Key, tuple[int, ...], torch.dtype]]:
    program = plan.schedule.programs[rank]
    for step in program.steps:
        if isinstance(step, Attend) and not step.fused:  # whose call stores its result alone
            shape = output_shape(plan, step.queries, step.heads)
            yield ("lse", step), (shape[0], shape[2], shape[1]), torch.float32
            if not program.in_place(step):
                yield ("out", step), shape, plan.shape.dtype
        elif isinstance(step, Merge):
            for chunk in step.queries:
                if chunk != rank and program.num_partials[chunk, step.heads] > 1:
                    shape = output_shape(plan, (chunk,), step.heads)
                    yield ("merged", (chunk, step.heads)), shape, plan.shape.dtype
