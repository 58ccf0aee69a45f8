"""Head groups in turn: group g's exchange runs under group g - 1's attention.

Every group's queries attend all keys in one call, so nothing is merged and any attention kernel
serves, also one that has no log-sum-exp. Of each group the queries of others come first: their
output goes home under the attention of the own queries, which read the layer's input and write its
result in place. Both kinds have a compute stream, so that what one call's last tiles leave idle
the next call takes.
"""

from __future__ import annotations

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.program_builder import ProgramBuilder
from swiftfusion_xdit.schedule.steps import Program, Stream
from swiftfusion_xdit.schedule.torus import (
    MachineChunks,
    relay_keys,
    scatter,
    wait_relayed_keys,
)


def pipelined(mesh: Mesh, rank: int, *, groups_per_rank: int = 2) -> Program:
    """One rank's program that works through ``groups_per_rank`` groups of its heads."""
    chunks = MachineChunks(mesh, rank)
    others = [chunk for chunk in chunks.all_queries() if chunk != rank]
    b = ProgramBuilder(
        mesh,
        rank,
        query_order=[rank, *others],
        key_order=sorted(chunks.all_keys()),
        groups_per_rank=groups_per_rank,
    )
    _exchange(b)
    for group in range(groups_per_rank):
        with b.stage(f"group[{group}]"):
            _receive(b, chunks, group)
            if others:
                b.attend(others, b.key_order, group=group)
                b.merge_and_push(others, stream=_way_home(mesh), group=group)
            b.attend([rank], b.key_order, stream="compute2", group=group)
            b.merge_and_push([rank], stream=_way_home(mesh), own_stream="compute2", group=group)
    b.collect_output()
    return b.finish()


def whole_sequence(mesh: Mesh, rank: int, *, groups_per_rank: int = 2) -> Program:
    """The same with one call a group; groups take turns on the two compute streams.

    Rows lie in rank order, so without a ring a kernel sees the sequence as one process would, as
    masks and sparse patterns need it.
    """
    chunks = MachineChunks(mesh, rank)
    queries, keys = sorted(chunks.all_queries()), sorted(chunks.all_keys())
    b = ProgramBuilder(
        mesh, rank, query_order=queries, key_order=keys, groups_per_rank=groups_per_rank
    )
    _exchange(b)
    for group in range(groups_per_rank):
        compute: Stream = "compute2" if group % 2 else "compute"
        with b.stage(f"group[{group}]"):
            _receive(b, chunks, group, compute)
            b.attend(queries, keys, stream=compute, group=group)
            b.merge_and_push(
                queries,
                stream=_way_home(mesh),
                merge_stream=compute,
                own_stream=compute,
                group=group,
            )
    b.collect_output()
    return b.finish()


def _exchange(b: ProgramBuilder) -> None:
    """All groups' rows in their order; the own ones while there is nothing to attend yet."""
    for group in range(b.groups_per_rank):
        b.copy_own(stream="compute", group=group)
    for group in range(b.groups_per_rank):
        scatter(b, group=group)


def _receive(
    b: ProgramBuilder, chunks: MachineChunks, group: int, stream: Stream = "compute"
) -> None:
    for i in range(1, b.mesh.torus):
        relay_keys(b, chunks, i, group=group)
    for chunk in chunks.all_queries():
        b.wait("q", chunk, stream=stream, group=group)
    for chunk in chunks.keys(0):
        b.wait("kv", chunk, stream=stream, group=group)
    for i in range(1, b.mesh.torus):
        wait_relayed_keys(b, chunks, i, stream=stream, group=group)


def _way_home(mesh: Mesh) -> Stream:
    """The stream that the inputs have left free by then."""
    return "torus" if mesh.torus > 1 else "ring"
