"""Chunk lengths may change from call to call, also where some ranks' own lengths stay the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.sequence_parallel import MAX_PLANS, SequenceParallel
from tests.meshes import meshes_of
from tests.sp_cases import Case, run_cases

A = (5, 6, 7, 4)
ONE_MORE = (5, 6, 7, 5)  # three ranks do not see that it is another shape
EMPTY = (0, 0, 22, 0)


@pytest.mark.parametrize("schedule", ["torus", "pipelined"])
@pytest.mark.parametrize("mesh", meshes_of(4), ids=str)
def test_exact_after_every_change(rank_pool, mesh: Mesh, schedule: str) -> None:
    base = Case(mesh, A, A, schedule=schedule, machines=mesh.torus)
    sequence = [
        replace(base, query_lengths=q, key_lengths=k, seed=seed)
        for seed, (q, k) in enumerate(
            [
                (A, A),
                (A, A),
                (ONE_MORE, ONE_MORE),
                (A, A),
                (ONE_MORE, A),
                (A, ONE_MORE),
                (EMPTY, A),
                (A, EMPTY),
                (A, A),
                (ONE_MORE, ONE_MORE),
            ]
        )
    ]
    errors = rank_pool(4).run(run_cases, sequence, 3)
    assert max(errors) <= 2e-6, (mesh, schedule, errors)


def count_collectives(rank: int, world_size: int) -> list[int]:
    """Collectives in each of some calls with (5, 6) rows, then (5, 7), then (5, 6) again."""
    calls = []
    all_gather = dist.all_gather
    counted = [0]

    def counting(*args: object, **kwargs: object) -> object:
        counted[0] += 1
        return all_gather(*args, **kwargs)

    dist.all_gather = counting
    try:
        with SequenceParallel() as sp:
            for second in (6, 6, 6, 7, 7, 6, 6):
                rows = (5, second)[rank]
                counted[0] = 0
                q = torch.randn(1, rows, 2, 8)
                sp.attention(q, q, q)
                calls.append(counted[0])
    finally:
        dist.all_gather = all_gather
    return calls


def test_no_collective_while_lengths_stay(rank_pool) -> None:
    for calls in rank_pool(2).run(count_collectives):
        assert [calls[i] for i in (1, 2, 4, 6)] == [0, 0, 0, 0], calls
        assert min(calls[i] for i in (0, 3, 5)) > 0, calls


def test_many_shapes_stay_bounded(rank_pool) -> None:
    """More shapes than are kept, twice round: what was dropped is made again."""
    base = Case(Mesh(2), (1, 2), (1, 2), machines=2)
    sequence = [replace(base, query_lengths=(n, 3)) for n in range(1, MAX_PLANS + 4)]
    errors = rank_pool(2).run(run_cases, sequence, 2)
    assert max(errors) <= 2e-6, errors
