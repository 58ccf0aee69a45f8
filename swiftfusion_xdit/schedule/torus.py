"""Torus Attention: the all-to-all across machines, cut by machine and hidden under attention.

Source: SwiftFusion (arXiv 2601.20273), Torus Attention. With T machines and rank (t, u, r):

1. *Pull Q*, T stages: attend the queries at hand, first the stationary ones of machine t, with
   the keys of machine t, while the queries of the next machine arrive. The last stage fetches the
   first remote keys.
2. *Pull KV*, T - 1 stages: attend the remote queries, all here by now, with the keys of machine
   t + i while those of machine t + i + 1 arrive.
3. *Push O*: send the remote queries' output home while the stationary queries attend the remote
   keys, which are all here.

Stationary and remote queries have a compute stream each: where one's last tiles leave units idle,
the other's begin. Inside a machine keys go round the ring: each rank puts its own rows to every
rank that will attend them, and hands on what it receives from another machine, so that a row
crosses machines once.

On one machine's mesh (T = 1) heads may go in groups. Where keys come in more slowly than they are
attended, only the last group's attention is left when all are here.
"""

from __future__ import annotations

from itertools import product

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.program_builder import ProgramBuilder
from swiftfusion_xdit.schedule.steps import Program, Stream


class MachineChunks:
    """The chunks that rank (t, u, r) attends, by machine offset i from t and ring step s."""

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh = mesh
        self.at = mesh.coordinates(rank)

    def queries(self, *offsets: int) -> list[int]:
        """Query chunks of machines t + i: those on the same place of the ring."""
        return [chunk for i in offsets for chunk in self.entering(i)]

    def keys(self, *offsets: int) -> list[int]:
        """Key chunks of machines t + i, in ring order."""
        return [
            chunk for i in offsets for s in range(self.mesh.ring) for chunk in self.ring_step(i, s)
        ]

    def ring_step(self, i: int, s: int) -> list[int]:
        """Key chunks of machine t + i that reach this rank in ring step s."""
        t, r = self.at.torus + i, self.at.ring - s
        return [self.mesh.rank(t, u, r) for u in range(self.mesh.ulysses)]

    def entering(self, i: int) -> list[int]:
        """Chunks of machine t + i that enter machine t at this rank."""
        return self.ring_step(i, 0)

    def all_queries(self) -> list[int]:
        return self.queries(*range(self.mesh.torus))

    def all_keys(self) -> list[int]:
        return self.keys(*range(self.mesh.torus))


def torus(mesh: Mesh, rank: int, *, groups_per_rank: int = 1) -> Program:
    """One rank's program of Torus Attention.

    Raises:
        ValueError: several head groups on a mesh with a torus axis, whose stages pipeline already.
    """
    if groups_per_rank > 1 < mesh.torus:
        raise ValueError(
            f"groups_per_rank must be 1 with schedule 'torus' on a mesh with torus > 1, got "
            f"{groups_per_rank} on {mesh}"
        )
    chunks = MachineChunks(mesh, rank)
    b = ProgramBuilder(
        mesh,
        rank,
        query_order=chunks.all_queries(),
        key_order=chunks.all_keys(),
        groups_per_rank=groups_per_rank,
    )
    remote = range(1, mesh.torus)

    for group in range(groups_per_rank):
        scatter(b, group=group)
    stationary(b, chunks, copy_stream="compute2" if remote else "compute")
    for i in remote:
        with b.stage(f"pull_q[{i}]"):
            for chunk in chunks.queries(i):
                b.wait("q", chunk, stream="compute2")
            if i == mesh.torus - 1:
                relay_keys(b, chunks, 1)
            b.attend(chunks.queries(i), chunks.keys(0), stream="compute2")

    for i in remote:
        with b.stage(f"pull_kv[{i}]"):
            if i + 1 in remote:
                relay_keys(b, chunks, i + 1)
            wait_relayed_keys(b, chunks, i, stream="compute2")
            b.attend(chunks.queries(*remote), chunks.keys(i), stream="compute2")

    with b.stage("push_o"):
        if remote:
            b.merge_and_push(chunks.queries(*remote), stream="torus", merge_stream="compute2")
            b.attend(chunks.queries(0), chunks.keys(*remote))
        for group in range(groups_per_rank):
            b.merge_and_push(chunks.queries(0), stream="ring", group=group)
    b.collect_output()
    return b.finish()


def scatter(b: ProgramBuilder, *, group: int = 0) -> None:
    """Put this rank's rows to every rank that attends them, in the order they are wanted."""
    mesh, (t, u, r) = b.mesh, (b.at.torus, b.at.ulysses, b.at.ring)
    with b.stage("pull_q[0]"):
        for v in range(1, mesh.ulysses):
            b.put("q", mesh.rank(t, u + v, r), stream="ring", group=group)
        for s in range(mesh.ring):
            for v in range(mesh.ulysses):
                if (s, v) != (0, 0):
                    b.put("kv", mesh.rank(t, u + v, r + s), stream="ring", group=group)
    # Machine t is i machines ahead of machine t - i, which therefore wants it in stage i.
    for tensors, stage in (("q", "pull_q"), ("kv", "pull_kv")):
        for i in range(1, mesh.torus):
            with b.stage(f"{stage}[{i}]"):
                for v in range(mesh.ulysses):
                    b.put(tensors, mesh.rank(t - i, u + v, r), stream="torus", group=group)


def stationary(
    b: ProgramBuilder, chunks: MachineChunks, *, copy_stream: Stream = "compute"
) -> None:
    """Attend the queries of the own machine with its keys, one ring step after another."""
    groups, steps = range(b.groups_per_rank), range(b.mesh.ring)
    with b.stage("pull_q[0]"):
        for group in groups:
            b.copy_own(stream=copy_stream, group=group)
        # Of every group what is at hand first, then the ring in the order in which it comes.
        for group, s in [*((group, 0) for group in groups), *product(groups, steps[1:])]:
            if s == 0:
                for chunk in chunks.queries(0):
                    b.wait("q", chunk, group=group)
            for chunk in chunks.ring_step(0, s):
                b.wait("kv", chunk, group=group)
            b.attend(chunks.queries(0), chunks.ring_step(0, s), group=group)


def relay_keys(b: ProgramBuilder, chunks: MachineChunks, i: int, *, group: int = 0) -> None:
    """Take in the keys of machine t + i that enter here and hand them on round the ring."""
    mesh, at = b.mesh, b.at
    for chunk in chunks.entering(i):
        b.wait("kv", chunk, stream="ring", group=group)
    for s in range(1, mesh.ring):
        peer = mesh.rank(at.torus, at.ulysses, at.ring + s)
        for chunk in chunks.entering(i):
            b.relay("kv", chunk, peer, stream="ring", group=group)


def wait_relayed_keys(
    b: ProgramBuilder,
    chunks: MachineChunks,
    i: int,
    *,
    stream: Stream = "compute",
    group: int = 0,
) -> None:
    """Wait for the keys of machine t + i that entered at the other ranks of the ring."""
    mesh, at = b.mesh, b.at
    for s in range(1, mesh.ring):
        source = mesh.rank(at.torus, at.ulysses, at.ring - s)
        for chunk in chunks.ring_step(i, s):
            b.wait("kv", chunk, source=source, stream=stream, group=group)
