"""Segments are private to the user, hard to guess, and have no name once the ranks share them."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from swiftfusion_xdit.comm import ShmCommunicator, segment
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks


def names() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("swiftfusion-*")}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Whoever else runs this code on the machine has names for a moment; only ours would stay."""
    before = names()
    yield
    left = names() - before
    for _ in range(100):
        if not left:
            break
        time.sleep(0.1)
        left &= names()
    assert not left


def segments_while_attaching(rank: int, world_size: int) -> tuple[list[tuple[str, int]], set[str]]:
    seen: list[tuple[str, int]] = []
    attach = segment._attach

    def look_and_attach(path: Path, layout: segment.Layout) -> object:
        info = path.lstat()
        assert info.st_uid == os.geteuid()
        assert info.st_size == layout.segment_bytes
        seen.append((path.name, info.st_mode))
        return attach(path, layout)

    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=20) as comm:
        segment._attach = look_and_attach  # type: ignore[assignment]
        comm.allocate(10_000, num_flags=3)
        dist.barrier()
        return seen, names() & {name for name, _ in seen}


def test_names_are_random_private_and_gone_after_allocate() -> None:
    results = run_ranks(3, segments_while_attaching)
    for seen, left in results:
        assert len({name for name, _ in seen}) == 3
        assert all(re.fullmatch(r"swiftfusion-[0-9a-f]{32}", name) for name, _ in seen)
        assert all(stat.S_ISREG(mode) and stat.S_IMODE(mode) == 0o600 for _, mode in seen)
        assert not left
    assert results[0][0] == results[1][0] == results[2][0]


def allocate_too_much(rank: int, world_size: int, num_bytes: int) -> str:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=20) as comm:
        with pytest.raises(OSError) as info:
            comm.allocate(num_bytes, num_flags=0)
        assert info.value.errno == errno.ENOSPC
        comm.allocate(64, num_flags=0)
        return str(info.value)


def test_full_file_system_is_an_error_that_names_the_bytes() -> None:
    num_bytes = 1 << 50
    for message in run_ranks(2, allocate_too_much, num_bytes):
        assert (
            f"rank 0 cannot create its segment in /dev/shm: {os.strerror(errno.ENOSPC)}" in message
        )
        assert re.search(rf"; {num_bytes} bytes wanted a rank, \d+ bytes available", message)


def fail_on_one_rank(rank: int, world_size: int, bad_rank: int) -> str:
    def refuse(path: Path, layout: segment.Layout) -> None:
        raise PermissionError(errno.EACCES, "no")

    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=20) as comm:
        if rank == bad_rank:
            segment._attach = refuse  # type: ignore[assignment]
        with pytest.raises(PermissionError) as info:
            comm.allocate(64, num_flags=0)
        return str(info.value)


def test_a_rank_that_cannot_attach_is_named_on_every_rank() -> None:
    for message in run_ranks(3, fail_on_one_rank, 1):
        assert "rank 1 cannot map the segments of the group" in message


def die_while_named(rank: int, world_size: int, victim: int) -> str:
    comm = ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=20)
    if rank == victim:
        create = segment._create

        def create_and_die(path: Path, layout: segment.Layout) -> None:
            create(path, layout)
            assert path.exists()
            os.kill(os.getpid(), signal.SIGKILL)

        segment._create = create_and_die
    with comm, pytest.raises(RuntimeError) as info:
        comm.allocate(4096, num_flags=1)
    return type(info.value).__name__


def test_survivors_remove_the_segment_of_a_rank_killed_during_allocate() -> None:
    assert run_ranks(3, die_while_named, 1, may_die=[1])[1] is None


@pytest.mark.parametrize("trick", ["symlink", "mode", "size", "fifo", "missing"])
def test_what_is_not_a_peers_segment_is_refused(tmp_path: Path, trick: str) -> None:
    layout = segment.Layout(num_bytes=100, num_flags=1)
    path = tmp_path / "segment"
    segment._create(path, layout)
    segment._attach(path, layout)
    if trick == "symlink":
        path = tmp_path / "link"
        path.symlink_to(tmp_path / "segment")
    elif trick == "mode":
        path.chmod(0o640)
    elif trick == "size":
        os.truncate(path, layout.segment_bytes - 1)
    else:
        path.unlink()
        if trick == "fifo":
            os.mkfifo(path, 0o600)
    with pytest.raises(OSError):
        segment._attach(path, layout)


def test_an_existing_file_is_never_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    path.write_text("someone else's")
    with pytest.raises(FileExistsError):
        segment._create(path, segment.Layout(num_bytes=100, num_flags=1))
    assert path.read_text() == "someone else's"
