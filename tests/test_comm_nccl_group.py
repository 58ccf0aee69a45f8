"""When the nccl transport makes a group of its own: only where its ranks can do so alone."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from swiftfusion_xdit.comm.nccl import _can_make_group
from tests.distributed import RankPool


def can_make(rank: int, size: int, uneven: bool) -> list[bool]:
    """Of the group of all ranks, then of the even or odd ones; ``uneven``: rank 0 has another."""
    known = set(dist.distributed_c10d._world.pg_map)
    halves = [dist.new_group(list(range(first, size, 2))) for first in (0, 1)]
    if uneven and rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    assert dist.group.WORLD is not None
    found = [_can_make_group(group) for group in (dist.group.WORLD, halves[rank % 2])]
    for group in [made for made in dist.distributed_c10d._world.pg_map if made not in known]:
        dist.destroy_process_group(group)
    return found


def test_ranks_that_know_other_groups_are_told_apart(
    rank_pool: Callable[[int], RankPool],
) -> None:
    assert rank_pool(4).run(can_make, False) == [[True, True]] * 4
    found = rank_pool(4).run(can_make, True)
    assert found == [[False, False], [False, True], [False, False], [False, True]]
