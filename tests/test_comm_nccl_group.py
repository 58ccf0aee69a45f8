"""The group that the nccl transport makes: where its ranks can do so alone, once for all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm.nccl import _can_make_group, _own_group, exchange
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


def share(rank: int, size: int) -> list[bool]:
    """With gloo in NCCL's place: the second transport's group, and one after all are gone."""
    group, made = dist.new_group(list(range(size))), []

    def new_group(ranks: list[int], **options: Any) -> Any:
        assert options["backend"] == "nccl" and options["pg_options"].is_high_priority_stream
        made.append(dist.distributed_c10d._new_group_with_tag(ranks, backend="gloo"))
        return made[-1]

    stand_in = SimpleNamespace(Options=lambda **options: SimpleNamespace(**options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", new_group)
        patch.setattr(dist, "ProcessGroupNCCL", stand_in, raising=False)
        first, second = (_own_group(group, 30.0) for _ in range(2))
        dist.destroy_process_group(first)
        third = _own_group(group, 30.0)
        found = [first is second, third is first, len(made) == 2]
    for each in (third, group):
        dist.destroy_process_group(each)
    return found


def test_transports_of_a_group_share_one_until_it_is_destroyed(
    rank_pool: Callable[[int], RankPool],
) -> None:
    assert rank_pool(2).run(share) == [[True, False, True]] * 2


def give(rank: int, size: int) -> list[bool]:
    """With gloo in NCCL's place: what each brings differs in number, size and type."""
    group = dist.new_group(list(range(size)))
    generator = torch.Generator().manual_seed(0)
    brought = [
        [torch.randn(3, 5, generator=generator), torch.arange(7, dtype=torch.int16)],
        [torch.randn(2, 3, 4, generator=generator).to(torch.bfloat16)],
    ]
    found = []
    for mine, theirs in ((brought[0], brought[1]), (brought[0], []), (brought[0], brought[0])):
        out, expected = (mine, theirs) if rank == 0 else (theirs, mine)
        into = [torch.zeros_like(tensor) for tensor in expected]
        exchange(group, out, into)
        found += [torch.equal(x, y) for x, y in zip(into, expected, strict=True)]
    dist.destroy_process_group(group)
    return found


def test_two_ranks_give_each_other_what_they_bring(
    rank_pool: Callable[[int], RankPool],
) -> None:
    assert rank_pool(2).run(give) == [[True] * 3, [True] * 6]
