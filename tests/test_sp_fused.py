"""Layers whose call waits for its keys itself are exact; what cannot be served so is pipelined."""

from __future__ import annotations

import logging

import pytest
import torch

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import (
    FUSED_TILE_ROWS,
    AttentionShape,
    make_plan,
    needs_lse,
    not_fused_because,
)
from swiftfusion_xdit.sequence_parallel import SequenceParallel
from swiftfusion_xdit.topology import Topology
from tests.sp_cases import Case, run_cases

LENGTHS = {2: (300, 170), 3: (131, 290, 259), 4: (260, 130, 131, 141)}


@pytest.mark.parametrize("num_ranks", LENGTHS)
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_oracle(rank_pool, num_ranks: int, kv_heads: int, dtype: torch.dtype) -> None:
    cases = [
        Case(
            mesh=Mesh(ring=num_ranks),
            query_lengths=(7, 5, 3, 9)[:num_ranks],
            key_lengths=LENGTHS[num_ranks][shift:] + LENGTHS[num_ranks][:shift],
            schedule="fused",
            batch=2,
            num_heads=6,
            num_kv_heads=kv_heads,
            dtype=dtype,
            layout=layout,
        )
        for shift, layout in enumerate(("BSHD", "padded"))
    ]
    errors = rank_pool(num_ranks).run(run_cases, cases, 3)
    assert max(errors) <= (2e-6 if dtype == torch.float32 else 1e-2), errors


def name_of(rank: int, size: int, keys: tuple[int, ...], options: dict) -> tuple[str, str]:
    """The schedule that a layer gets, and what is said about it."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("swiftfusion_xdit.sequence_parallel")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with SequenceParallel(schedule="fused", **options) as sp:
            q, k = torch.randn(1, 4, 2, 8), torch.randn(1, keys[rank], 2, 8)
            sp.attention(q, k, k)
            sp.attention(q, k, k)
            assert sp.plan is not None
            return sp.plan.schedule.name, " ".join(line for line in said if "fused" in line)
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("keys", "options", "reason"),
    [
        ((200, 200), {}, ""),
        ((200, 20), {}, "bring enough to fill up a tile of 128, got 20 of 220 at rank 1"),
        ((200, 200), {"machines": 2}, "inside one machine, got 2"),
        ((200, 200), {"mesh": "ulysses=2"}, "needs a mesh with torus=1, ulysses=1"),
    ],
)
def test_what_it_cannot_serve_is_pipelined_and_said_once(
    rank_pool, keys: tuple[int, int], options: dict, reason: str
) -> None:
    (name, said), (other, nothing) = rank_pool(2).run(name_of, keys, options)
    assert name == other == ("pipelined" if reason else "fused")
    assert nothing == "" and said.count("it is pipelined") == bool(reason) and reason in said


def shape(kv_heads: int = 6, **changes: object) -> AttentionShape:
    values: dict = {
        "query_lengths": (4, 4),
        "key_lengths": (256, 256),
        "num_heads": 6,
        "head_dim": 64,
        **changes,
    }
    return AttentionShape(batch=1, num_kv_heads=kv_heads, dtype=torch.bfloat16, **values)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"wire": "fp8"}, "wire 'fp8'"),
        ({"query_lengths": (4, 0)}, r"bring queries, got \(4, 0\)"),
        ({"key_lengths": (0, 256)}, "got 0 of 256 at rank 0"),
        ({"key_lengths": (256, 0)}, "got 256 of 256 at rank 0"),
    ],
)
def test_shapes_it_serves(changes: dict, reason: str) -> None:
    topology, mesh = Topology.split(2, 1), Mesh(ring=2)
    found = not_fused_because(shape(**changes), mesh, topology)
    assert bool(found) == bool(reason)
    if reason:
        with pytest.raises(ValueError, match=f"schedule 'fused' cannot serve .*{reason}"):
            make_plan(shape(**changes), topology, schedule="fused")
    else:
        plan = make_plan(shape(**changes), topology, schedule="fused")
        assert plan.mesh == mesh and not needs_lse(plan.schedule)


@pytest.mark.parametrize(
    ("kv_heads", "wanted", "sizes"),
    [
        (24, 0, [2, 10, 10, 2]),
        (24, 5, [5, 5, 5, 5, 4]),
        (24, 99, [1] * 24),
        (12, 0, [3] * 4),
        (12, 5, [3] * 4),
        (6, 0, [2] * 3),
        (1, 0, [1]),
    ],
)
def test_head_groups(kv_heads: int, wanted: int, sizes: list[int]) -> None:
    """The first is small, and query heads that share keys stay in one group."""
    plan = make_plan(
        shape(kv_heads, num_heads=24, query_lengths=(2304, 2304), head_dim=128),
        Topology.split(2, 1),
        schedule="fused",
        num_units=132,
        groups_per_rank=wanted,
    )
    groups = [plan.heads("k", heads) for heads in range(plan.schedule.groups_per_rank)]
    assert [len(group) for group in groups] == sizes
    assert [head for group in groups for head in group] == list(range(kv_heads))


def test_memory_holds_what_is_received_up_to_the_end_of_a_tile() -> None:
    plan = make_plan(shape(key_lengths=(300, 170)), Topology.split(2, 1), schedule="fused")
    for rank, received in enumerate((170, 300)):
        rows = -(-received // FUSED_TILE_ROWS) * FUSED_TILE_ROWS
        assert plan.layouts[rank].array("k", 0).shape == (1, rows, 6, 64)
        assert plan.layouts[rank].layer_bytes == 2 * rows * 6 * 64 * 2
