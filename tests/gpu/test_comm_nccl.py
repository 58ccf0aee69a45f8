"""The nccl transport: the same exchanges over sends and receives that both ends derive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm.nccl import NcclCommunicator
from swiftfusion_xdit.topology import Topology
from tests.gpu.comm_cases import Exchange, many_turns, replays
from tests.gpu.holding_up import hold_up
from tests.gpu.ranks import run_on_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


def make(group: dist.ProcessGroup, topology: Topology) -> NcclCommunicator:
    return NcclCommunicator(group, topology, timeout_s=60)


@pytest.mark.parametrize("machines", [1, 2])  # sends and receives, all-gathers
@pytest.mark.parametrize("contiguous", [False, True])
def test_no_message_is_lost_torn_or_overwritten(contiguous: bool, machines: int) -> None:
    run_on_gpus(2, many_turns, make, 300, contiguous, machines)


@pytest.mark.parametrize("machines", [1, 2])
def test_a_captured_exchange_replays_exactly(machines: int) -> None:
    run_on_gpus(2, replays, make, 200, machines)


def measure(rank: int, size: int) -> tuple[float | None, float | None]:
    found = []
    for machines in (1, 2):
        with make(dist.group.WORLD, Topology.split(size, machines)) as comm:
            found.append(comm.measure_across())
            dist.barrier()
    return found[0], found[1]


def test_the_way_to_the_next_machine_is_measured() -> None:
    for alone, between_two in run_on_gpus(2, measure):
        assert alone is None
        assert between_two is not None and 0.01 < between_two < 2000


def refuse(rank: int, size: int) -> None:
    with make(dist.group.WORLD, Topology.split(size, 1)) as comm:
        exchange = Exchange(comm, contiguous=False)
        buffer, region, peer = exchange.buffer, exchange.regions[0], 1 - rank
        with pytest.raises(RuntimeError, match="between begin_layer and end_layer"):
            comm.put(exchange.payload(rank), buffer, region, peer)
        with pytest.raises(NotImplementedError, match="has no get"):
            comm.get(buffer, region, peer)
        unbound = comm.allocate(1024, num_flags=0)
        with pytest.raises(RuntimeError, match="needs bind"):
            comm.begin_layer(unbound, "a layer")
        dist.barrier()


def test_what_is_refused() -> None:
    run_on_gpus(2, refuse)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_rank_that_does_not_come_is_reported(how: str, tmp_path: Path) -> None:
    hold_up("nccl", how, tmp_path, timeout_s=600 if how == "kill" else 4)
