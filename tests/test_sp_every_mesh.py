"""Exact on every mesh of up to 8 ranks, with uneven chunks and heads, over repeated layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swiftfusion_xdit.mesh import Mesh
from tests.distributed import RankFailure
from tests.meshes import meshes_of
from tests.sp_cases import Case, run_cases, uneven

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("schedule", ["torus", "folded", "pipelined"])
def test_against_the_oracle(rank_pool, num_ranks: int, schedule: str) -> None:
    for mesh in meshes_of(num_ranks):
        for dtype, bound in BOUNDS.items():
            case = Case(
                mesh=mesh,
                query_lengths=uneven(4 * num_ranks + 3, num_ranks),
                key_lengths=uneven(5 * num_ranks + 1, num_ranks),
                schedule=schedule,
                machines=mesh.torus,
                batch=2,
                num_heads=9,
                num_kv_heads=3,
                dtype=dtype,
            )
            errors = rank_pool(num_ranks).run(run_cases, [case], 3)
            assert max(errors) <= bound, (case, errors)


def num_groups(rank: int, world_size: int, case: Case) -> int:
    with case.open() as sp:
        case.error(sp, rank)
        assert sp.plan is not None
        return sp.plan.schedule.groups_per_rank


def test_forced_head_groups_are_those_that_run(rank_pool) -> None:
    case = Case(Mesh(ring=2), (9, 7), (9, 7), groups=3)
    assert rank_pool(2).run(num_groups, case) == [3, 3]
    with pytest.raises(RankFailure, match=r"groups must be 1 with .* got groups=2 on torus=2,"):
        rank_pool(2).run(num_groups, replace(case, mesh=Mesh(torus=2), machines=2))


@pytest.mark.parametrize("groups", [2, 4, 100])  # of nine heads, three with keys
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_torus_in_head_groups(rank_pool, num_ranks: int, groups: int) -> None:
    for mesh in meshes_of(num_ranks):
        if mesh.torus > 1:
            continue
        case = Case(
            mesh=mesh,
            query_lengths=uneven(4 * num_ranks + 3, num_ranks),
            key_lengths=uneven(5 * num_ranks + 1, num_ranks),
            groups=groups,
            batch=2,
            num_heads=9,
            num_kv_heads=3,
        )
        errors = rank_pool(num_ranks).run(run_cases, [case], 3)
        assert max(errors) <= 2e-6, (case, errors)


@pytest.mark.parametrize("strategy", ["usp", "tas"])
def test_classic_strategies(rank_pool, strategy: str) -> None:
    for mesh in [*meshes_of(4), Mesh(2, 1, 3)]:
        case = Case(
            mesh=mesh,
            query_lengths=uneven(23, mesh.size),
            key_lengths=uneven(23, mesh.size),
            schedule="auto",
            strategy=strategy,
            num_heads=5,
            num_kv_heads=5,
        )
        errors = rank_pool(mesh.size).run(run_cases, [case], 3)
        assert max(errors) <= 2e-6, (case, errors)
