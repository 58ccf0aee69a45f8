"""With fp8 on the wire every schedule sends the same messages, smaller by what a row shrinks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from swiftfusion_xdit import wire
from swiftfusion_xdit.mesh import Mesh
from tests.sp_cases import Case

MESHES = (Mesh(2, 1, 2), Mesh(2, 2, 1), Mesh(1, 2, 2), Mesh(1, 1, 4), Mesh(4, 1, 1))
KINDS = [("torus", name) for name in ("torus", "folded", "pipelined")]
KINDS += [("usp", "auto"), ("tas", "auto")]


def count(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """What one layer sends, by class of link."""
    with case.open() as sp:
        case.error(sp, rank)
        sp.reset_stats()
        case.error(sp, rank)
        return {link: sp.stats()[link] for link in ("same_machine", "across_machines")}


@pytest.mark.parametrize(("strategy", "schedule"), KINDS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (24, torch.float32)])
def test_bytes(rank_pool, strategy: str, schedule: str, head_dim: int, dtype: torch.dtype) -> None:
    for mesh in MESHES:
        exact = Case(
            mesh,
            (5, 3, 0, 4),
            (2, 6, 3, 1),
            schedule,
            strategy,
            machines=2,
            batch=2,
            num_heads=6,
            num_kv_heads=3,
            head_dim=head_dim,
            dtype=dtype,
        )
        before = rank_pool(4).run(count, exact)
        after = rank_pool(4).run(count, replace(exact, wire="fp8"))
        assert sum(sent["bytes"] for links in before for sent in links.values()) > 0
        for old, new in zip(before, after, strict=True):
            for link, sent in old.items():
                num_rows, rest = divmod(sent["bytes"], head_dim * dtype.itemsize)
                assert rest == 0
                expected = {**sent, "bytes": num_rows * wire.row_bytes(head_dim)}
                assert new[link] == expected, (mesh, link)
