"""A transport is chosen by name; what is not there is an error that says what is."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from swiftfusion_xdit.comm import ShmCommunicator, create_communicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks


def create(rank: int, world_size: int) -> None:
    topology = Topology.split(world_size, 1)
    for name in ("auto", "shm"):
        with create_communicator(name, dist.group.WORLD, topology, timeout_s=30) as comm:
            assert isinstance(comm, ShmCommunicator)
            assert (comm.rank, comm.size, comm.topology) == (rank, world_size, topology)
    for name in ("cuda", "nvshmem", "nccl"):
        with pytest.raises(ValueError, match=f"'{name}' serves tensors on GPUs, got device='cpu'"):
            create_communicator(name, dist.group.WORLD, topology, timeout_s=30)
    with pytest.raises(ValueError, match="'shm' serves tensors on the CPU, got device='cuda'"):
        create_communicator("shm", dist.group.WORLD, topology, timeout_s=30, device="cuda")
    with pytest.raises(ValueError, match="one of auto, shm, cuda, nvshmem, nccl, got 'rdma'"):
        create_communicator("rdma", dist.group.WORLD, topology, timeout_s=30)


def test_names() -> None:
    run_ranks(2, create)


def subgroup(rank: int, world_size: int) -> tuple[int, int] | None:
    ranks = [3, 1]
    group = dist.new_group(ranks)
    if rank not in ranks:
        return None
    with create_communicator("shm", group, Topology.split(2, 1), timeout_s=30) as comm:
        comm.post((rank, 0))
        dist.barrier(group)
        peer_global_rank, _ = comm.peek(1 - comm.rank)
        dist.barrier(group)
        return dist.get_global_rank(group, 1 - comm.rank), peer_global_rank


def test_ranks_are_those_of_the_group() -> None:
    assert run_ranks(4, subgroup) == [None, (3, 3), None, (1, 1)]
