"""Bytes that cross machines equal the paper's formulas, counted where they are put."""

from __future__ import annotations

import pytest
import torch

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.sequence_parallel import SequenceParallel

BATCH, ROWS_PER_RANK, HEADS, DIM, LAYERS = 2, 3, 32, 8, 2


def count(rank: int, world_size: int, strategy: str, mesh: Mesh, machines: int) -> tuple[int, int]:
    """Bytes this rank sent to its own machine and to others, per layer."""
    q = torch.randn(BATCH, ROWS_PER_RANK, HEADS, DIM)
    with SequenceParallel(strategy=strategy, mesh=mesh, machines=machines) as sp:
        sp.attention(q, q, q)
        sp.reset_stats()
        for _ in range(LAYERS):
            sp.attention(q, q, q)
        stats = sp.stats()
    assert stats["attention_calls"] == LAYERS
    sent = [stats[link]["bytes"] for link in ("same_machine", "across_machines")]
    assert all(total % LAYERS == 0 for total in sent)
    return sent[0] // LAYERS, sent[1] // LAYERS


@pytest.mark.parametrize("M", [1, 2, 4])
@pytest.mark.parametrize("N", [2, 4, 8])
def test_paper_formulas(rank_pool, N: int, M: int) -> None:
    elements = BATCH * (N * M * ROWS_PER_RANK) * HEADS * DIM
    swiftfusion = 4 * (N - 1) * elements // N**2  # Q, K, V, O of one machine
    usp = 2 * (N - 1) * elements // N  # K, V of one machine, N - 1 times
    inside = [(u, M // u) for u in (1, 2, 4) if M % u == 0]
    runs = [("torus", Mesh(N, u, r), swiftfusion) for u, r in inside]
    runs += [("usp", Mesh(1, M, N), usp)]
    if (N, M) == (2, 1):  # where a ring sends as much
        runs += [("torus", Mesh(ring=2), swiftfusion)]
    for strategy, mesh, per_machine in runs:
        sent = rank_pool(N * M).run(count, strategy, mesh, N)
        for machine in range(N):
            across = sum(sent[rank][1] for rank in range(machine * M, (machine + 1) * M))
            assert across == 4 * per_machine, (strategy, mesh, machine, across)


def test_inside_a_machine(rank_pool) -> None:
    """Ulysses moves 4 (P - 1) / P of a chunk, ring 2 (P - 1) chunks; to itself nobody sends."""
    chunk_bytes = 4 * BATCH * ROWS_PER_RANK * HEADS * DIM
    for mesh, expected in ((Mesh(1, 4, 1), 3 * chunk_bytes), (Mesh(1, 1, 4), 6 * chunk_bytes)):
        assert rank_pool(4).run(count, "torus", mesh, 1) == [(expected, 0)] * 4
    assert rank_pool(1).run(count, "torus", Mesh(), 1) == [(0, 0)]
