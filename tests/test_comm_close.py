"""Closing gives everything back, once; afterwards use is an error and not a crash."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, Region, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks

REGION = Region(0, (4,), (1,), torch.float32)


def use_after_close(rank: int, world_size: int) -> None:
    comm = ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30)
    freed = comm.allocate(48, num_flags=1)
    kept = comm.allocate(64, num_flags=1)
    for buffer in (freed, kept):
        comm.put(torch.ones(4), buffer, REGION, rank)
    local = kept.local
    comm.free(freed)
    with pytest.raises(ValueError, match="must be one of this communicator's"):
        comm.free(freed)
    comm.put(torch.full((4,), 2.0), kept, REGION, rank)
    comm.close()
    comm.close()
    for buffer, name in ((freed, "48 bytes"), (kept, "64 bytes")):
        buffer.close()
        for use in (
            lambda: comm.put(torch.ones(4), buffer, REGION, rank),  # noqa: B023
            lambda: comm.get(buffer, REGION, rank),  # noqa: B023
            lambda: comm.signal(buffer, 0, rank),  # noqa: B023
            lambda: comm.preset(buffer, 0),  # noqa: B023
            lambda: comm.wait(buffer, Flag(0, "x"), rank),  # noqa: B023
            lambda: buffer.local,  # noqa: B023
        ):
            with pytest.raises(RuntimeError, match=f"symmetric buffer of {name} is closed"):
                use()
    for use in (
        lambda: comm.post((1, 2)),
        lambda: comm.peek(rank),
        lambda: comm.free(kept),
        lambda: comm.allocate(1, num_flags=0),
    ):
        with pytest.raises(RuntimeError, match=f"shm communicator of rank {rank} is closed"):
            use()
    assert (REGION.view(local) == 2.0).all(), "a tensor over closed memory must stay valid"


def test_use_after_close_names_what_is_closed() -> None:
    run_ranks(2, use_after_close)


def resources() -> tuple[int, int]:
    """Open descriptors, and mappings of segments."""
    gc.collect()
    mappings = Path("/proc/self/maps").read_text().count("/dev/shm/swiftfusion-")
    return len(os.listdir("/proc/self/fd")), mappings  # noqa: PTH208


def open_and_close(rank: int, world_size: int) -> None:
    topology = Topology.split(world_size, 1)
    ShmCommunicator(dist.group.WORLD, topology, timeout_s=30).close()
    before = resources()
    for _ in range(5):
        with ShmCommunicator(dist.group.WORLD, topology, timeout_s=30) as comm:
            first = comm.allocate(4096, num_flags=2)
            second = comm.allocate(4096, num_flags=2)
            comm.put(torch.ones(4), first, REGION, rank)
            comm.free(second)
            assert resources()[1] == before[1] + 2 * world_size
            with pytest.raises(ValueError):
                comm.allocate(-1, num_flags=0)
    assert resources() == before
    assert before[1] == 0


def test_no_descriptor_or_mapping_is_left() -> None:
    run_ranks(2, open_and_close)


def close_before_peer_is_done(rank: int, world_size: int) -> None:
    comm = ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30)
    buffer = comm.allocate(64, num_flags=1)
    if rank == 0:
        comm.close()
        dist.barrier()
    else:
        dist.barrier()
        comm.put(torch.ones(4), buffer, REGION, 0)
        comm.signal(buffer, 0, 0)
        comm.close()


def test_a_rank_may_close_while_a_peer_still_puts() -> None:
    run_ranks(2, close_before_peer_is_done)
