"""on_wait runs while a flag is not set, may end the wait, and does not run without a wait."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks

FLAG = Flag(0, "FULL[q]")


def count_calls(rank: int, world_size: int) -> None:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        buffer = comm.allocate(0, num_flags=1)
        calls = []

        def signal_on_fifth_call() -> None:
            calls.append(None)
            if len(calls) == 5:
                comm.preset(buffer, 0)

        comm.preset(buffer, 0)
        comm.wait(buffer, FLAG, 0, on_wait=signal_on_fifth_call)
        assert not calls, "the flag was set already"
        comm.wait(buffer, FLAG, 0, on_wait=signal_on_fifth_call)
        assert len(calls) == 5


def test_on_wait_is_called_until_the_flag_is_set() -> None:
    run_ranks(1, count_calls)


class Abort(Exception):
    pass


def abort(rank: int, world_size: int) -> None:
    def refuse() -> None:
        raise Abort

    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        buffer = comm.allocate(0, num_flags=1)
        with pytest.raises(Abort):
            comm.wait(buffer, FLAG, 0, on_wait=refuse)
        comm.preset(buffer, 0)
        comm.wait(buffer, FLAG, 0, on_wait=refuse)


def test_what_on_wait_raises_ends_the_wait_and_the_flag_stays_usable() -> None:
    run_ranks(1, abort)
