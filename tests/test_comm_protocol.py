"""A flag is binary: signalling it again before its owner has waited is caught where it happens."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks


def signal_twice(rank: int, world_size: int) -> None:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        buffer = comm.allocate(0, num_flags=3)
        comm.context = "step 4"
        peer = 1 - rank
        comm.signal(buffer, 1, peer)
        with pytest.raises(
            AssertionError,
            match=rf"rank {rank} signals flag 1 of rank {peer}, which is still set \(step 4\)",
        ):
            comm.signal(buffer, 1, peer)
        dist.barrier()
        comm.wait(buffer, Flag(1, "x"), peer)
        dist.barrier()
        comm.signal(buffer, 1, peer)
        comm.wait(buffer, Flag(1, "x"), peer)


def test_a_set_flag_may_not_be_signalled() -> None:
    run_ranks(2, signal_twice)
