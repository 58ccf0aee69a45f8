"""More ranks than cores make progress: a rank that waits gives its core to one that works."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, Region, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks


def pass_a_token_around(rank: int, world_size: int, num_rounds: int, num_cores: int) -> int:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])
    token = Region(0, (1,), (1,), torch.int64)
    full = Flag(0, "FULL[token]")
    before, after = (rank - 1) % world_size, (rank + 1) % world_size
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=60) as comm:
        buffer = comm.allocate(8, num_flags=1)
        value = token.view(buffer.local)
        for turn in range(num_rounds):
            if rank > 0 or turn > 0:
                comm.wait(buffer, full, before)
            comm.put(value + 1, buffer, token, after)
            comm.signal(buffer, 0, after)
        if rank == 0:
            comm.wait(buffer, full, before)
        return int(value.item())


@pytest.mark.parametrize(("world_size", "num_cores"), [(4, 2), (8, 2), (8, 1)])
def test_a_token_passes_all_ranks(world_size: int, num_cores: int) -> None:
    num_rounds = 300
    values = run_ranks(world_size, pass_a_token_around, num_rounds, num_cores, timeout_s=120)
    assert values[0] == num_rounds * world_size
