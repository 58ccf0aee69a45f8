"""Readers of a board always see a pair that was posted, and never an older one than before."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Region, ShmCommunicator, semaphore
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks

LAST = 40_000


def partner(word: int) -> int:
    return random.Random(word).getrandbits(64) - 2**63


def post_or_read(rank: int, world_size: int) -> int:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        assert [comm.peek(peer) for peer in range(world_size)] == [(0, 0)] * world_size
        dist.barrier()
        if rank == 0:
            for word in range(1, LAST + 1):
                comm.post((word, partner(word)))
            return LAST
        newest = num_seen = 0
        while newest < LAST:
            word, other = comm.peek(0)
            assert word >= newest, f"word {word} after {newest}"
            assert other == (partner(word) if word else 0), f"torn pair at word {word}"
            num_seen += word > newest
            newest = word
        return num_seen


def test_pairs_are_never_torn() -> None:
    results = run_ranks(3, post_or_read, timeout_s=120)
    assert min(results) > 1, f"readers saw too few posts to prove anything: {results}"


def overtaken_reader(rank: int, world_size: int) -> None:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        fence = semaphore.fence
        for num_posts in (1, 2, 3, 4):
            comm.post((0, 0))
            first = True

            def post_before_fence() -> None:
                nonlocal first
                semaphore.fence = fence
                for turn in range(num_posts if first else 0):  # noqa: B023
                    comm.post((turn, turn))
                first = False
                fence()

            semaphore.fence = post_before_fence
            assert comm.peek(0) == (num_posts - 1, num_posts - 1)
            assert not first


def test_a_reader_that_is_overtaken_reads_again() -> None:
    run_ranks(1, overtaken_reader)


def post_halfway(rank: int, world_size: int) -> None:
    class Died(Exception):
        pass

    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        fence = semaphore.fence
        for last_fence in (1, 2):
            comm.post((7, 8))
            calls = 0

            def die_at_fence() -> None:
                nonlocal calls
                calls += 1
                if calls == last_fence:  # noqa: B023
                    raise Died

            semaphore.fence = die_at_fence
            with pytest.raises(Died):
                comm.post((9, 10))
            semaphore.fence = fence
            assert comm.peek(0) == (7, 8)
        comm.post((11, 12))
        assert comm.peek(0) == (11, 12)


def test_a_writer_that_dies_halfway_leaves_the_last_pair() -> None:
    run_ranks(1, post_halfway)


def announce_data(rank: int, world_size: int) -> None:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        region = Region(0, (1000,), (1,), torch.int64)
        buffer = comm.allocate(region.num_bytes, num_flags=0)
        for turn in range(1, 200):
            if rank == 0:
                comm.put(torch.full((1000,), turn), buffer, region, 1)
                comm.post((turn, -turn))
                while comm.peek(1) != (turn, turn):
                    pass
            else:
                while comm.peek(0) != (turn, -turn):
                    pass
                assert (region.view(buffer.local) == turn).all(), f"turn {turn}"
                comm.post((turn, turn))


def test_a_post_comes_after_the_puts_before_it() -> None:
    run_ranks(2, announce_data, timeout_s=120)


def post_limits(rank: int, world_size: int) -> None:
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        comm.post((2**63 - 1, -(2**63)))
        assert comm.peek(0) == (2**63 - 1, -(2**63))
        for words in ((2**63, 0), (0, -(2**63) - 1)):
            with pytest.raises(ValueError, match="must fit int64"):
                comm.post(words)
        assert comm.peek(0) == (2**63 - 1, -(2**63))
        with pytest.raises(ValueError, match=r"peer must be a rank in \[0, 1\), got 1"):
            comm.peek(1)


def test_words_are_int64() -> None:
    run_ranks(1, post_limits)
