"""Ranks without common memory tell each other two words through the group's store."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from swiftfusion_xdit.comm import hosts
from swiftfusion_xdit.comm.board import Board
from tests.distributed import run_ranks


def post_and_peek(rank: int, world_size: int) -> list[tuple[int, int]]:
    group = dist.group.WORLD
    assert hosts.one_host(group)
    assert isinstance(hosts.make_board(group), Board)
    assert not any(process.exited() for process in hosts.watch_processes(group))
    first, second = hosts.StoreBoard(group), hosts.StoreBoard(group)
    assert [first.peek(peer) for peer in range(world_size)] == [(0, 0)] * world_size
    dist.barrier()
    first.post((rank + 1, -(2**63)), rank=rank)
    second.post((7, 2**63 - 1), rank=rank)
    dist.barrier()
    with pytest.raises(ValueError, match="board words must fit int64"):
        first.post((2**63, 0), rank=rank)
    assert [second.peek(peer) for peer in range(world_size)] == [(7, 2**63 - 1)] * world_size
    return [first.peek(peer) for peer in range(world_size)]


def test_words_are_those_posted_last() -> None:
    assert run_ranks(3, post_and_peek) == [[(1, -(2**63)), (2, -(2**63)), (3, -(2**63))]] * 3
