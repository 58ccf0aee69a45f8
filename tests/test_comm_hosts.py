"""Ranks that do not share memory are told so, on every rank, before anything is allocated."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from swiftfusion_xdit.comm import ShmCommunicator, process, segment, shm
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks


def meet(rank: int, world_size: int, difference: str, directory: str) -> str:
    if rank == 2:
        if difference == "host":
            socket.gethostname = lambda: "far-away"
            shm._boot_id = lambda: b"a kernel far off"
        else:
            segment.DIRECTORY = Path(directory)
    with pytest.raises(ValueError) as info:
        ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30)
    return str(info.value)


@pytest.mark.parametrize("difference", ["host", "mount"])
def test_ranks_on_different_hosts_are_named(difference: str) -> None:
    here = socket.gethostname()
    there = "far-away" if difference == "host" else here
    # /proc is a file system of its own, as another container's /dev/shm is.
    for message in run_ranks(3, meet, difference, "/proc"):
        assert message.startswith("transport shm needs every rank on one host with one ")
        assert f"rank 0: '{here}' (boot " in message
        assert f"rank 2: '{there}' (boot " in message


def wrong_topology(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError) as info:
        ShmCommunicator(dist.group.WORLD, Topology.split(4, 2), timeout_s=30)
    return str(info.value)


def test_topology_must_place_every_rank() -> None:
    expected = "topology must place every rank of the group: it has 4 ranks, the group has 2"
    assert run_ranks(2, wrong_topology) == [expected] * 2


def test_a_process_of_another_pid_namespace_is_never_called_dead() -> None:
    unseen = process.PeerProcess(None, started=0)
    assert not unseen.exited()
    assert unseen.describe() == "its process cannot be seen from this PID namespace"
    unseen.close()


def test_a_reused_pid_is_not_taken_for_the_peer() -> None:
    pid = os.getpid()
    assert not process.PeerProcess(pid, started=process.start_time(pid)).exited()
    assert process.PeerProcess(pid, started=process.start_time(pid) - 1).exited()


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_a_process_not_yet_collected_has_exited(
    has_pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(read_end, 1)
        os._exit(0)
    watched = process.PeerProcess(pid, started=process.start_time(pid))
    try:
        assert not watched.exited()
        assert watched.describe() == f"process {pid} is alive"
        os.write(write_end, b"x")
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert watched.exited()
        assert watched.describe() == f"process {pid} has exited"
    finally:
        os.waitpid(pid, 0)
        watched.close()
        os.close(read_end)
        os.close(write_end)
