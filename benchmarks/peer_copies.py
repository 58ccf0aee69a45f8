"""How fast do GPUs of one machine copy to each other: by message, row, number of peers, streams?

    python -m benchmarks.peer_copies [--json FILE]

GPUs push at once, each the same amount, from one process, in CUDA graphs. "Peers in turn" is what
a layer over more than two GPUs does: copies to the next rank, the one after it, and so on. In step:
a GPU turns to its next peer when its own message of the turn has arrived, or when that peer's has,
from whoever pushes to it before (as layers do, see `schedule/turns.py`). The first GPU alone shows
whether it is the engine or the links that take their time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import environment, provenance
from swiftfusion_xdit import native
from swiftfusion_xdit.cli.bench_report import write_json
from swiftfusion_xdit.native import ABSOLUTE, Op, Place

SIZES_MIB = (1.0, 2.0, 6.0, 24.0)
ROW_BYTES = (512, 1536, 6144)  # of heads that go, out of rows of 6144 bytes; 6144: contiguous
PITCH = 6144
TOTAL_MIB = 192.0  # that each GPU pushes in a sample
NUM_SAMPLES = 7
FLAG_BYTES = 64
NO_STEP, OWN, PEERS = "", "own arrives", "the peer's arrives"


def num_copies(size: int, peers: int) -> int:
    """Of a sample: equally many to each peer."""
    return max(peers, round(TOTAL_MIB * 2**20 / size / peers) * peers)


class Pushes:
    """The copies of GPUs, to peers in turn, on one stream or on a stream each."""

    def __init__(self, lib: native.Native, num_gpus: int, memory: dict[int, torch.Tensor]) -> None:
        self.lib, self.num_gpus, self.memory = lib, num_gpus, memory
        most = max(num_copies(int(mib * 2**20), num_gpus - 1) for mib in SIZES_MIB)
        self.flags = {
            rank: torch.zeros(most * FLAG_BYTES, dtype=torch.uint8, device=f"cuda:{rank}")
            for rank in range(num_gpus)
        }

    def graphs(
        self,
        size: int,
        width: int,
        peers: int,
        streams: int,
        by_kernel: bool,
        *,
        senders: int,
        in_step: str,
    ) -> list[Any]:
        """A CUDA graph for each GPU that pushes."""
        rows, count = size // width, num_copies(size, peers)
        found = []
        for rank in range(senders):
            ops = [Op.record(0, 0), *(Op.wait_event(s, 0) for s in range(1, streams))]
            for idx in range(count):
                distance = 1 + idx % peers
                stream = (distance - 1) % streams
                if in_step and idx:
                    mine = self._flag(rank, idx)
                    ops += [Op.wait(stream, mine), Op.clear(stream, mine)]
                ops += Op.copies(
                    stream,
                    Place(0, 0),
                    # A place of its own for each sender.
                    Place(distance, distance * self.half // self.num_gpus),
                    shape=(rows, width),
                    src_stride=(PITCH, 1),
                    dst_stride=(width, 1),
                    itemsize=1,
                    by_kernel=by_kernel,
                )
                if in_step and idx + 1 < count:
                    peer = (rank + distance) % self.num_gpus
                    following = (peer - 1 - (idx + 1) % peers) % self.num_gpus
                    told = peer if in_step == OWN else following
                    ops.append(Op.write(stream, self._flag(told, idx + 1)))
            for stream in range(1, streams):
                ops += [Op.record(stream, stream), Op.wait_event(0, stream)]
            found.append(self._captured(rank, ops, streams))
        return found

    def _flag(self, rank: int, idx: int) -> Place:
        """What the copy ``idx`` of a GPU waits for."""
        return Place(ABSOLUTE, self.flags[rank].data_ptr() + idx * FLAG_BYTES)

    @property
    def half(self) -> int:
        """Sources fill the first half of each GPU's memory, targets the second."""
        return self.memory[0].nbytes // 2

    def _captured(self, rank: int, ops: list[Op], streams: int) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(rank):
            program = self.lib.program(ops)
            others = [self.memory[(rank + d) % self.num_gpus] for d in range(1, self.num_gpus)]
            targets = [x.data_ptr() + self.half for x in others][: program.num_bases - 1]
            handles = [torch.cuda.Stream(rank) for _ in range(streams)]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=handles[0]):
                bases = [self.memory[rank].data_ptr(), *targets]
                program.run(bases=bases, streams=[s.cuda_stream for s in handles])
            return graph

    def microseconds(self, graphs: list[Any]) -> float:
        """Of the slowest GPU, all replaying at once; median over samples."""
        samples = []
        for _ in range(NUM_SAMPLES + 1):
            events = []
            for rank in range(self.num_gpus):
                torch.cuda.synchronize(rank)
            for rank, graph in enumerate(graphs):
                with torch.cuda.device(rank):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    graph.replay()
                    end.record()
                    events.append((start, end))
            for rank in range(self.num_gpus):
                torch.cuda.synchronize(rank)
            samples.append(max(start.elapsed_time(end) * 1e3 for start, end in events))
        return statistics.median(samples[1:])


def measure(num_gpus: int) -> list[dict[str, Any]]:
    lib = native.load()
    most = int(max(SIZES_MIB) * 2**20)
    # A copy of narrow rows reaches over PITCH / width times its size.
    num_bytes = 2 * max(most * PITCH // min(ROW_BYTES), most * num_gpus)
    memory = {
        rank: torch.zeros(num_bytes, dtype=torch.uint8, device=f"cuda:{rank}")
        for rank in range(num_gpus)
    }
    for a, b in itertools.permutations(range(num_gpus), 2):
        memory[b][:16].copy_(memory[a][:16])  # torch enables peer access
    pushes = Pushes(lib, num_gpus, memory)
    found = []
    for mib, width, (peers, streams, senders, in_step), by_kernel in itertools.product(
        SIZES_MIB, ROW_BYTES, ways(num_gpus), (False, True)
    ):
        if by_kernel and (in_step or senders < num_gpus):
            continue
        size = int(mib * 2**20) // width * width
        graphs = pushes.graphs(
            size, width, peers, streams, by_kernel, senders=senders, in_step=in_step
        )
        us = pushes.microseconds(graphs)
        count = num_copies(size, peers)
        found.append(
            {
                "mib": mib,
                "row_bytes": width,
                "peers_in_turn": peers,
                "streams": streams,
                "senders": senders,
                "in_step": in_step,
                "by": "kernel" if by_kernel else "engines",
                "us_a_copy": round(us / count, 2),
                "gb_per_s": round(count * size / us / 1e3, 1),
            }
        )
    return found


def ways(num_gpus: int) -> list[tuple[int, int, int, str]]:
    """(peers in turn, streams, GPUs that push, in step) of everything that is compared."""
    others = num_gpus - 1
    found = [(1, 1, num_gpus, NO_STEP)]
    if others > 1:
        found += [(others, 1, 1, NO_STEP), (others, others, num_gpus, NO_STEP)]
        found += [(others, 1, num_gpus, in_step) for in_step in (NO_STEP, OWN, PEERS)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_copies", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    args = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        parser.error(f"needs at least 2 GPUs, {num_gpus} here")
    results = measure(num_gpus)
    table = Table(title=f"{num_gpus} GPUs, GB/s out of each that pushes")
    for heading in results[0]:
        table.add_column(heading.replace("_", " "), justify="right")
    for result in results:
        table.add_row(*map(str, result.values()))
    Console(highlight=False, markup=False).print(table)
    if args.json is not None:
        report = {**provenance("peer_copies", __doc__), **environment(), "results": results}
        write_json(args.json, report)


if __name__ == "__main__":
    main()
