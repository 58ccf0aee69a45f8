"""Torus Attention with the remote queries' stages folded into one: fewer calls, fewer merges.

Where links are fast against attention, the stationary queries' first call hides the whole
exchange. All remote queries then attend all keys at once, which leaves them nothing to merge, and
the stationary queries attend the remote keys last, while the remote output goes home.

The remote queries have a compute stream of their own: where the stationary ones' last tiles leave
units idle, theirs begin.
"""

from __future__ import annotations

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.program_builder import ProgramBuilder
from swiftfusion_xdit.schedule.steps import Program
from swiftfusion_xdit.schedule.torus import (
    MachineChunks,
    relay_keys,
    scatter,
    stationary,
    wait_relayed_keys,
)


def folded(mesh: Mesh, rank: int) -> Program:
    """One rank's program; like ``torus`` for a mesh with torus=1."""
    chunks = MachineChunks(mesh, rank)
    b = ProgramBuilder(mesh, rank, query_order=chunks.all_queries(), key_order=chunks.all_keys())
    remote = range(1, mesh.torus)

    scatter(b)
    stationary(b, chunks, copy_stream="compute2")
    if remote:
        with b.stage("pull"):
            for i in remote:
                relay_keys(b, chunks, i)
            for i in remote:
                for chunk in chunks.queries(i):
                    b.wait("q", chunk, stream="compute2")
                wait_relayed_keys(b, chunks, i, stream="compute2")
            b.attend(chunks.queries(*remote), chunks.all_keys(), stream="compute2")
    with b.stage("push_o"):
        if remote:
            b.merge_and_push(chunks.queries(*remote), stream="torus", merge_stream="compute2")
            b.attend(chunks.queries(0), chunks.keys(*remote))
        b.merge_and_push(chunks.queries(0), stream="ring")
    b.collect_output()
    return b.finish()
