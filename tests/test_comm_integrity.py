"""Every message arrives whole and in order, over slots that are used again and again."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Flag, Region, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import run_ranks

ELEMENTS = 20_000
SLOTS = 2


def payload(writer: int, reader: int, turn: int) -> torch.Tensor:
    """What ``writer`` puts to ``reader`` in this turn; all elements depend on all three."""
    start = (turn * 64 + writer) * 64 + reader
    return torch.arange(start, start + 7 * ELEMENTS, 7, dtype=torch.int64)


def all_to_all_turns(rank: int, world_size: int, num_turns: int) -> None:
    slot_bytes = ELEMENTS * 8
    peers = [(rank + shift) % world_size for shift in range(world_size)]
    uneven = random.Random(rank)
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=60) as comm:
        buffer = comm.allocate(slot_bytes * SLOTS * world_size, num_flags=2 * SLOTS * world_size)
        for index in range(SLOTS * world_size):
            comm.preset(buffer, SLOTS * world_size + index)

        def slot(writer: int, turn: int) -> int:
            return writer * SLOTS + turn % SLOTS

        def region(writer: int, turn: int) -> Region:
            return Region(slot(writer, turn) * slot_bytes, (ELEMENTS,), (1,), torch.int64)

        for turn in range(num_turns):
            for peer in peers:
                free = SLOTS * world_size + slot(peer, turn)
                comm.wait(buffer, Flag(free, f"FREE[to {peer}, turn {turn}]"), peer)
                comm.put(payload(rank, peer, turn), buffer, region(rank, turn), peer)
                comm.signal(buffer, slot(rank, turn), peer)
            if uneven.random() < 0.1:
                time.sleep(uneven.random() * 0.002)
            for peer in peers:
                comm.wait(buffer, Flag(slot(peer, turn), f"FULL[{peer}, turn {turn}]"), peer)
                got = region(peer, turn).view(buffer.local)
                wrong = (got != payload(peer, rank, turn)).sum().item()
                assert wrong == 0, f"{wrong} elements wrong: {peer} -> {rank}, turn {turn}"
                comm.signal(buffer, SLOTS * world_size + slot(rank, turn), peer)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_no_message_is_lost_torn_or_overwritten(world_size: int) -> None:
    run_ranks(world_size, all_to_all_turns, 400, timeout_s=120)
