"""One attention call a layer, whose kernel waits for the keys of its peers itself.

Queries stay where they are: each rank attends its own, all heads, with every rank's keys. It puts
its keys and values to all peers, nearest first, and its kernel begins with its own, which need no
copy, and goes on with those of the peer before it, of the one before that, and so on, each as it
arrives. Nothing is merged, no query or output moves, and there is one launch.

Keys go in head groups, so that the tiles of the first heads, which a GPU takes up first, find all
of theirs while the rest is still on its way. The first group is small: the units that take up its
tiles wait for next to nothing, and those that do wait take fewer tiles in the end.
"""

from __future__ import annotations

import math
from typing import Protocol

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.program_builder import ProgramBuilder
from swiftfusion_xdit.schedule.steps import Program

MOST_GROUPS = 4
# Of keys and values of a rank, which go to every peer: up to here a kernel of few blocks puts them
# to several peers in less time than copy engines, which need some microseconds for each message.
# Beyond, the units that it takes are missed (benchmarks/results/puts_by_kernel.md).
MOST_KERNEL_BYTES = 16 * 2**20
MOST_KERNEL_RANKS = 8
KERNEL_GROUPS = 2  # it puts wide rows faster than narrow ones


class KeySizes(Protocol):
    """Of a layer's keys and values, by rank: rows, heads, and bytes of an element."""

    @property
    def batch(self) -> int: ...
    @property
    def key_lengths(self) -> tuple[int, ...]: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def itemsize(self) -> int: ...


def suits_kernel_puts(shape: KeySizes) -> bool:
    """Whether the puts of a fused layer are best made by a kernel.

    A rank where it cannot (`device_runtime/puts.py`) makes them by copy engines, in as many groups.
    """
    row_bytes = 2 * shape.num_kv_heads * shape.head_dim * shape.itemsize
    is_short = shape.batch * max(shape.key_lengths) * row_bytes <= MOST_KERNEL_BYTES
    return is_short and 2 < len(shape.key_lengths) <= MOST_KERNEL_RANKS


def fused_groups(
    num_heads: int,
    num_kv_heads: int,
    *,
    wanted: int = 0,
    heads_at_once: float = 0,
    put_by_kernel: bool = False,
) -> tuple[int, int]:
    """(head groups, heads of the first and the last, see ``mesh.head_group_sizes``).

    Args:
        wanted: how many groups, if there are as many heads; 0 leaves it open.
        heads_at_once: whose tiles a GPU takes up together; 0 if unknown.
    """
    groups = min(wanted or (KERNEL_GROUPS if put_by_kernel else MOST_GROUPS), num_kv_heads)
    if num_kv_heads == num_heads:
        return groups, 0 if wanted or put_by_kernel else math.ceil(heads_at_once / 4)
    # Query heads that share keys stay together.
    return max(n for n in range(1, groups + 1) if num_kv_heads % n == 0), 0


def fused(mesh: Mesh, rank: int, *, groups_per_rank: int = 1) -> Program:
    """One rank's program.

    Raises:
        ValueError: the mesh has more than a ring.
    """
    if mesh.num_head_groups != 1:
        raise ValueError(f"schedule 'fused' needs a mesh with torus=1 and ulysses=1, got {mesh}")
    arrivals = [mesh.rank(0, 0, rank - distance) for distance in range(1, mesh.ring)]
    b = ProgramBuilder(
        mesh,
        rank,
        query_order=[rank],
        key_order=[*reversed(arrivals), rank],
        groups_per_rank=groups_per_rank,
    )
    for group in range(groups_per_rank):
        for distance in range(1, mesh.ring):
            with b.stage(f"distance[{distance}]"):
                b.put("kv", mesh.rank(0, 0, rank + distance), stream="ring", group=group)
    for group in range(groups_per_rank):
        with b.stage(f"group[{group}]"):
            for chunk in arrivals:
                b.wait("kv", chunk, group=group)
            b.attend([rank], b.key_order, group=group, fused=True)
            b.merge_and_push([rank], stream="ring", group=group)
    b.collect_output()
    return b.finish()
