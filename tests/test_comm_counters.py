"""Counters hold the payload of every put and get, per class of link."""

from __future__ import annotations

import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, Region, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks

NOTHING = {
    link: {"bytes": 0, "messages": 0} for link in ("same_rank", "same_machine", "across_machines")
}


def count(rank: int, world_size: int) -> dict[str, dict[str, int]]:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 2), timeout_s=30) as comm:
        buffer = comm.allocate(1024, num_flags=1)
        assert comm.counters.as_dict() == NOTHING
        gaps = Region(0, (4, 3), (8, 2), torch.bfloat16)
        empty = Region(0, (0, 3), (8, 2), torch.bfloat16)
        src = torch.ones(4, 3, dtype=torch.bfloat16)
        for peer in range(world_size):
            comm.put(src, buffer, gaps, peer)
            comm.put(src[:0], buffer, empty, peer)
        comm.get(buffer, gaps, (rank + 2) % world_size)
        comm.signal(buffer, 0, rank)
        comm.wait(buffer, Flag(0, "x"), rank)
        counted = comm.counters.as_dict()
        comm.counters.reset()
        assert comm.counters.as_dict() == NOTHING
        dist.barrier()
        return counted


def test_bytes_and_messages_per_link() -> None:
    num_bytes = 4 * 3 * 2
    expected = {
        "same_rank": {"bytes": num_bytes, "messages": 1},
        "same_machine": {"bytes": num_bytes, "messages": 1},
        "across_machines": {"bytes": 3 * num_bytes, "messages": 3},
    }
    assert run_ranks(4, count) == [expected] * 4
