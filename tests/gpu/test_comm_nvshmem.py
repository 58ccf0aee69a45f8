"""The nvshmem transport: over mapped peers, and the way that crosses machines, on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm.nvshmem import NvshmemCommunicator
from swiftfusion_xdit.topology import Topology
from tests.gpu.comm_cases import Make, many_turns, replays
from tests.gpu.holding_up import hold_up
from tests.gpu.ranks import run_on_gpus

pytest.importorskip("nvshmem", reason="needs nvshmem4py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


def mapped(group: dist.ProcessGroup, topology: Topology) -> NvshmemCommunicator:
    return NvshmemCommunicator(group, topology, timeout_s=60)


def unmapped(group: dist.ProcessGroup, topology: Topology) -> NvshmemCommunicator:
    return NvshmemCommunicator(group, topology, timeout_s=60, map_peers=False)


@pytest.mark.parametrize("make", [mapped, unmapped])
@pytest.mark.parametrize("contiguous", [False, True])
def test_no_message_is_lost_torn_or_overwritten(make: Make, contiguous: bool) -> None:
    run_on_gpus(2, many_turns, make, 300, contiguous)


def test_a_captured_exchange_replays_exactly() -> None:
    run_on_gpus(2, replays, mapped, 300)


def twice(rank: int, size: int) -> None:
    many_turns(rank, size, mapped, 20, False)
    many_turns(rank, size, unmapped, 20, False)


def test_one_initialisation_serves_several_communicators() -> None:
    run_on_gpus(2, twice)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_rank_that_does_not_come_is_reported(how: str, tmp_path: Path) -> None:
    hold_up("nvshmem", how, tmp_path, timeout_s=600 if how == "kill" else 4)
