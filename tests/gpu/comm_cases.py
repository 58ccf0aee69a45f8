"""What every transport on GPUs must do, written once: two ranks that exchange strided blocks."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.comm import Flag, Region, Transfer
from swiftfusion_xdit.comm.stream import StreamBuffer, StreamCommunicator
from swiftfusion_xdit.topology import Topology

SHAPE = (2, 700, 3, 64)  # the block that moves
HEADS = 8  # of the tensors that it is a part of, at both ends
DTYPE = torch.int32  # compares exactly
NUM_PARITIES = 2

Make = Callable[[dist.ProcessGroup, Topology], StreamCommunicator]


def slot(parity: int, *, contiguous: bool) -> Region:
    """A block among the heads of a larger array, or one by itself."""
    batch, rows, heads, dim = SHAPE
    columns = heads if contiguous else HEADS
    matrix_bytes = batch * rows * HEADS * dim * DTYPE.itemsize
    skipped = 0 if contiguous else 2 * dim * DTYPE.itemsize
    stride = (rows * columns * dim, columns * dim, dim, 1)
    return Region(parity * matrix_bytes + skipped, SHAPE, stride, DTYPE)


def buffer_bytes() -> int:
    batch, rows, _, dim = SHAPE
    return NUM_PARITIES * batch * rows * HEADS * dim * DTYPE.itemsize


def full_flag(parity: int) -> Flag:
    return Flag(parity, f"FULL of parity {parity}")


def free_flag(parity: int) -> Flag:
    return Flag(NUM_PARITIES + parity, f"FREE of parity {parity}")


class Exchange:
    """Each turn, both ranks put a fresh strided block into the other and check what came."""

    def __init__(self, comm: StreamCommunicator, *, contiguous: bool) -> None:
        self.comm = comm
        self.peer = 1 - comm.rank
        self.regions = [slot(parity, contiguous=contiguous) for parity in range(NUM_PARITIES)]
        buffer = comm.allocate(buffer_bytes(), num_flags=2 * NUM_PARITIES)
        assert isinstance(buffer, StreamBuffer)
        self.buffer = buffer
        comm.bind(buffer, self.transfers())
        flags = [make(p) for p in range(NUM_PARITIES) for make in (full_flag, free_flag)]
        comm.name_flags(buffer, [(flag, self.peer) for flag in flags])
        for parity in range(NUM_PARITIES):
            comm.preset(buffer, free_flag(parity).index)
        torch.cuda.synchronize()
        dist.barrier()
        batch, rows, _, dim = SHAPE
        count = batch * rows * HEADS * dim
        self.base = torch.arange(count, dtype=DTYPE, device="cuda").view(batch, rows, HEADS, dim)
        self.turn = torch.zeros((), dtype=DTYPE, device="cuda")
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def transfers(self) -> list[Transfer]:
        return [
            Transfer(
                src,
                1 - src,
                self.regions[parity],
                full_flag(parity).index,
                free_flag(parity).index,
                parity,
                0,
            )
            for parity in range(NUM_PARITIES)
            for src in range(2)
        ]

    def payload(self, writer: int) -> Tensor:
        """What ``writer`` puts in this turn: a slice of heads."""
        return (self.base + self.turn * 7919 + writer * 104729)[:, :, 1:4]

    def run(self, parity: int, *, context: str = "turn") -> None:
        """One turn, enqueued."""
        comm, buffer, region = self.comm, self.buffer, self.regions[parity]
        comm.begin_layer(buffer, context, parity=parity)
        comm.wait(buffer, free_flag(parity), self.peer)
        comm.put(self.payload(comm.rank), buffer, region, self.peer)
        comm.signal(buffer, full_flag(parity).index, self.peer)
        comm.wait(buffer, full_flag(parity), self.peer)
        self.wrong += (region.view(buffer.local) != self.payload(self.peer)).sum()
        comm.signal(buffer, free_flag(parity).index, self.peer)
        self.turn += 1
        comm.end_layer(buffer)

    def check(self, num_turns: int) -> None:
        torch.cuda.synchronize()
        assert self.turn.item() == num_turns
        assert self.wrong.item() == 0, f"{self.wrong.item()} elements in {num_turns} turns"


def many_turns(
    rank: int, size: int, make: Make, num_turns: int, contiguous: bool, machines: int = 1
) -> None:
    """Hundreds of turns at uneven paces; no message is lost, torn or overwritten."""
    uneven = random.Random(rank)
    with make(dist.group.WORLD, Topology.split(size, machines)) as comm:
        exchange = Exchange(comm, contiguous=contiguous)
        for turn in range(num_turns):
            if uneven.random() < 0.2:
                torch.cuda._sleep(int(uneven.random() * 200_000))
            exchange.run(turn % NUM_PARITIES)
        exchange.check(num_turns)
        expected = {"bytes": num_turns * exchange.regions[0].num_bytes, "messages": num_turns}
        link = comm.topology.link(rank, 1 - rank)
        assert comm.counters.as_dict()[link.value] == expected
        dist.barrier()
        comm.free(exchange.buffer)
        dist.barrier()


def replays(rank: int, size: int, make: Make, num_replays: int, machines: int = 1) -> None:
    """A captured pair of turns replays exactly, also between turns that are not captured."""
    with make(dist.group.WORLD, Topology.split(size, machines)) as comm:
        exchange = Exchange(comm, contiguous=False)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for turn in range(4):
                exchange.run(turn % NUM_PARITIES)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for parity in range(NUM_PARITIES):
                exchange.run(parity)
        dist.barrier()
        num_turns = 4
        for replay in range(num_replays):
            graph.replay()
            num_turns += NUM_PARITIES
            if replay % 10 == 9:
                for parity in range(NUM_PARITIES):
                    exchange.run(parity)
                num_turns += NUM_PARITIES
        exchange.check(num_turns)
        dist.barrier()
        del graph
        comm.free(exchange.buffer)
        dist.barrier()
