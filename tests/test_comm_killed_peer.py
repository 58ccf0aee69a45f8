"""A rank killed in the middle of the work is reported at once by those who wait for it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, PeerTimeout, Region, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks

VICTIM = 2
TIMEOUT_S = 600.0


def wait_for_victim(rank: int, world_size: int) -> tuple[str, float, int]:
    comm = ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=TIMEOUT_S)
    buffer = comm.allocate(1024, num_flags=4)
    comm.post((os.getpid(), 0))
    dist.barrier()
    pid, _ = comm.peek(VICTIM)
    if rank == VICTIM:
        time.sleep(0.2)  # the others are asleep in their waits by then
        os.kill(pid, signal.SIGKILL)
    comm.context = f"attention call 12, step {rank} (pull_kv[1])"
    start = time.monotonic()
    with pytest.raises(PeerTimeout) as info:
        comm.wait(buffer, Flag(3, "FULL[k chunk 3 heads 1]"), VICTIM)
    waited_s = time.monotonic() - start
    maps = Path("/proc/self/maps").read_text().splitlines()
    segments = [line for line in maps if "/dev/shm/swiftfusion-" in line]
    assert len(segments) == 2 * world_size, "the board and the buffer, of every rank"
    assert all(line.endswith(" (deleted)") for line in segments), "a segment has kept its name"
    comm.close()
    return str(info.value), waited_s, pid


def test_survivors_name_the_dead_peer_long_before_the_deadline() -> None:
    results = run_ranks(4, wait_for_victim, may_die=[VICTIM])
    for rank, result in enumerate(results):
        if rank == VICTIM:
            assert result is None
            continue
        message, waited_s, pid = result
        assert re.fullmatch(
            rf"rank {rank} of 4 in attention call 12, step {rank} \(pull_kv\[1\]\): "
            r"waited \d+\.\d s of at most 600 s for FULL\[k chunk 3 heads 1\] \(flag 3\) "
            rf"from rank 2: expected 1, seen 0; rank 2's process {pid} has exited",
            message,
        )
        assert waited_s < TIMEOUT_S / 10


def wait_for_each_other(rank: int, world_size: int) -> str:
    comm = ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=TIMEOUT_S)
    buffer = comm.allocate(0, num_flags=1)
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        comm.wait(buffer, Flag(0, "FULL[q]"), rank + 1)
    except PeerTimeout:
        os._exit(3)  # what an uncaught error comes to; it must reach the rank before this one
    raise AssertionError("the flag was never set")


def test_the_report_travels_along_a_chain_of_waits() -> None:
    assert run_ranks(4, wait_for_each_other, may_die=[0, 1, 2, 3]) == [None] * 4


def read_what_a_dead_peer_sent(rank: int, world_size: int) -> float:
    comm = ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=20)
    buffer = comm.allocate(1024, num_flags=1)
    region = Region(0, (256,), (1,), torch.float32)
    pid = os.getpid()
    if rank == 1:
        comm.put(torch.full((256,), 1.5), buffer, region, 0)
        comm.signal(buffer, 0, 0)
        os.kill(pid, signal.SIGKILL)
    while not comm._processes[1].exited():
        time.sleep(0.01)
    comm.wait(buffer, Flag(0, "FULL[q]"), 1)
    return float(region.view(buffer.local).sum())


def test_what_a_peer_signalled_before_it_died_still_counts() -> None:
    assert run_ranks(2, read_what_a_dead_peer_sent, may_die=[1])[0] == 1.5 * 256


SCRIPT = """
import os, signal, sys
import torch.distributed as dist
from swiftfusion_xdit.comm import Flag, ShmCommunicator
from swiftfusion_xdit.topology import Topology

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
comm = ShmCommunicator(dist.group.WORLD, Topology.split(2, 1), timeout_s=600)
buffer = comm.allocate(4096, num_flags=1)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
comm.wait(buffer, Flag(0, "FULL[q]"), 1)
"""


def test_a_survivor_that_catches_nothing_exits_with_an_error(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store")],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode == 1, errors[0]
    assert "PeerTimeout: rank 0 of 2: waited" in errors[0]
    assert f"rank 1's process {ranks[1].pid} has exited" in errors[0]
