"""Head groups in turn: group g's exchange runs under group g - 1's attention.

Every group attends whole sequences in one call, so nothing is merged and any attention kernel
serves, also one that has no log-sum-exp. Rows lie in rank order, so without a ring a kernel sees
the sequence as one process would, as masks and sparse patterns need it.
"""

from __future__ import annotations

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.program_builder import ProgramBuilder
from swiftfusion_xdit.schedule.steps import Program
from swiftfusion_xdit.schedule.torus import (
    MachineChunks,
    relay_keys,
    scatter,
    wait_relayed_keys,
)


def pipelined(mesh: Mesh, rank: int, *, groups_per_rank: int = 2) -> Program:
    """One rank's program that works through ``groups_per_rank`` groups of its heads."""
    chunks = MachineChunks(mesh, rank)
    queries, keys = sorted(chunks.all_queries()), sorted(chunks.all_keys())
    b = ProgramBuilder(
        mesh, rank, query_order=queries, key_order=keys, groups_per_rank=groups_per_rank
    )
    scatter(b, group=0)
    for group in range(groups_per_rank):
        if group + 1 < groups_per_rank:
            scatter(b, group=group + 1)
        with b.stage(f"group[{group}]"):
            b.copy_own(group=group)
            for i in range(1, mesh.torus):
                relay_keys(b, chunks, i, group=group)
            _wait_all(b, chunks, group)
            b.attend(queries, keys, group=group)
            b.merge_and_push(queries, stream="torus", group=group)
    b.collect_output()
    return b.finish()


def _wait_all(b: ProgramBuilder, chunks: MachineChunks, group: int) -> None:
    for chunk in chunks.all_queries():
        b.wait("q", chunk, group=group)
    for chunk in chunks.keys(0):
        b.wait("kv", chunk, group=group)
    for i in range(1, b.mesh.torus):
        wait_relayed_keys(b, chunks, i, group=group)
