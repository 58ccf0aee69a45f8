"""Ranks must agree on the size of a buffer; any size works, zero too, and memory starts as zero."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, Region, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks


def allocate_error(rank: int, world_size: int, sizes: list[tuple[int, int]]) -> str:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=20) as comm:
        num_bytes, num_flags = sizes[rank]
        with pytest.raises(ValueError) as info:
            comm.allocate(num_bytes, num_flags=num_flags)
        comm.allocate(64, num_flags=1)  # the failure left the group usable
        return str(info.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            [(4096, 4), (4096, 4), (8192, 4)],
            "num_bytes must be the same on every rank, "
            "got rank 0: 4096, rank 1: 4096, rank 2: 8192",
        ),
        (
            [(4096, 4), (4096, 5)],
            "num_flags must be the same on every rank, got rank 0: 4, rank 1: 5",
        ),
        ([(-1, 4), (-1, 4)], "num_bytes must be >= 0, got -1"),
        ([(16, -4), (16, -4)], "num_flags must be >= 0, got -4"),
    ],
)
def test_bad_sizes_raise_on_every_rank(sizes: list[tuple[int, int]], message: str) -> None:
    assert run_ranks(len(sizes), allocate_error, sizes) == [message] * len(sizes)


def use_buffer(rank: int, world_size: int, num_bytes: int, num_flags: int) -> None:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=20) as comm:
        buffer = comm.allocate(num_bytes, num_flags=num_flags)
        assert (buffer.num_bytes, buffer.num_flags) == (num_bytes, num_flags)
        assert buffer.local.dtype == torch.uint8
        assert buffer.local.shape == (num_bytes,)
        assert not buffer.local.any()
        dist.barrier()
        everything = Region(0, (num_bytes,), (1,), torch.uint8)
        peer = (rank + 1) % world_size
        comm.put(torch.full((num_bytes,), rank + 1, dtype=torch.uint8), buffer, everything, peer)
        for index in range(num_flags):
            comm.signal(buffer, index, peer)
        for index in range(num_flags):
            comm.wait(buffer, Flag(index, f"flag {index}"), (rank - 1) % world_size)
        if num_flags == 0:
            dist.barrier()
        assert (buffer.local == (rank - 1) % world_size + 1).all()


@pytest.mark.parametrize("num_flags", [0, 1, 65])
@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 1_000_003])
def test_any_size_works(num_bytes: int, num_flags: int) -> None:
    run_ranks(2, use_buffer, num_bytes, num_flags)
