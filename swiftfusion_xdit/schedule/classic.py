"""Ulysses, Ring, and USP that combines them: the baselines.

All heads-for-rows exchanges happen before the first attention and after the last one; keys and
values then pass from neighbour to neighbour round the ring, one hop under each attention.
"""

from __future__ import annotations

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.program_builder import ProgramBuilder
from swiftfusion_xdit.schedule.steps import Program


def usp(mesh: Mesh, rank: int) -> Program:
    """One rank's program of USP: Ulysses over torus and ulysses, Ring over ring."""
    at = mesh.coordinates(rank)
    queries = mesh.query_ranks(rank)
    ring = [mesh.query_ranks(mesh.rank(0, 0, at.ring - s)) for s in range(mesh.ring)]
    b = ProgramBuilder(
        mesh, rank, query_order=queries, key_order=[chunk for step in ring for chunk in step]
    )
    here = queries.index(rank)
    with b.stage("scatter_heads"):
        for offset in range(1, len(queries)):
            b.put("qkv", queries[(here + offset) % len(queries)], stream="torus")
        b.copy_own(stream="compute")
        for chunk in queries:
            b.wait("qkv", chunk)
    left = mesh.rank(at.torus, at.ulysses, at.ring - 1)
    right = mesh.rank(at.torus, at.ulysses, at.ring + 1)
    for s, chunks in enumerate(ring):
        with b.stage(f"ring[{s}]"):
            if s > 0:
                for chunk in chunks:
                    b.wait("kv", chunk, source=left, stream="ring")
            if s + 1 < mesh.ring:
                for chunk in chunks:
                    b.relay("kv", chunk, right, stream="ring")
            b.attend(queries, chunks)
    with b.stage("gather_heads"):
        b.merge_and_push(queries, stream="torus")
    b.collect_output()
    return b.finish()


def ulysses(mesh: Mesh, rank: int) -> Program:
    """USP without a ring.

    Raises:
        ValueError: the mesh has a ring.
    """
    if mesh.ring != 1:
        raise ValueError(f"ulysses needs a mesh with ring=1, got {mesh}")
    return usp(mesh, rank)


def ring(mesh: Mesh, rank: int) -> Program:
    """USP without Ulysses.

    Raises:
        ValueError: the mesh splits heads.
    """
    if mesh.num_head_groups != 1:
        raise ValueError(f"ring needs a mesh with torus=1 and ulysses=1, got {mesh}")
    return usp(mesh, rank)
