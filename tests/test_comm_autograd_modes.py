"""Puts work inside and outside of inference mode, in any order, and record no gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Region, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks

MODES = {
    "plain": lambda: torch.enable_grad(),
    "no_grad": lambda: torch.no_grad(),
    "inference": lambda: torch.inference_mode(),
}


def put_in_modes(rank: int, world_size: int, modes: tuple[str, ...], needs_grad: bool) -> None:
    region = Region(0, (4, 4), (4, 1), torch.float32)
    contexts = [MODES[name]() for name in modes]
    with contexts[0]:
        comm = ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30)
        buffer = comm.allocate(region.num_bytes, num_flags=0)
    src = torch.randn(4, 4, requires_grad=needs_grad)
    for context in contexts[1:]:
        with context:
            buffer.local.zero_()
            comm.put(src, buffer, region, rank)
            got = comm.get(buffer, region, rank)
            assert torch.equal(got, src)
            assert not got.requires_grad
            assert torch.equal(region.view(buffer.local), src)
    comm.close()


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("modes", itertools.permutations(MODES), ids="-".join)
def test_any_order_of_modes(modes: tuple[str, ...], needs_grad: bool) -> None:
    run_ranks(1, put_in_modes, modes, needs_grad)
