"""A peer that lives but does not signal is reported when the deadline has passed."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, PeerTimeout, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks

TIMEOUT_S = 0.7


def wait_for_a_late_peer(rank: int, world_size: int, stopped: bool) -> tuple[str, float, int]:
    with ShmCommunicator(
        dist.group.WORLD, Topology.split(world_size, 1), timeout_s=TIMEOUT_S
    ) as comm:
        buffer = comm.allocate(64, num_flags=2)
        comm.post((os.getpid(), 0))
        dist.barrier()
        if rank == 1:
            dist.barrier()
            return "", 0.0, 0
        pid, _ = comm.peek(1)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        try:
            with pytest.raises(PeerTimeout) as info:
                comm.wait(buffer, Flag(1, "FREE[q slot 0]"), 1)
        finally:
            waited_s = time.monotonic() - start
            if stopped:
                os.kill(pid, signal.SIGCONT)
        dist.barrier()
        return str(info.value), waited_s, pid


@pytest.mark.parametrize("stopped", [False, True])
def test_report_says_that_the_peer_is_alive(stopped: bool) -> None:
    message, waited_s, pid = run_ranks(2, wait_for_a_late_peer, stopped)[0]
    state = r" \(stopped\)" if stopped else ""
    assert re.fullmatch(
        r"rank 0 of 2: waited \d+\.\d s of at most 0.7 s for FREE\[q slot 0\] \(flag 1\) "
        rf"from rank 1: expected 1, seen 0; rank 1's process {pid} is alive{state}",
        message,
    ), message
    assert waited_s >= TIMEOUT_S


def bad_timeout(rank: int, world_size: int, timeout_s: float) -> None:
    with pytest.raises(ValueError, match=f"timeout_s must be positive, got {timeout_s}"):
        ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=timeout_s)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_a_deadline_must_be_positive(timeout_s: float) -> None:
    run_ranks(1, bad_timeout, timeout_s)
