"""Which schedule and how many head groups a shape gets where nobody forces one."""

from __future__ import annotations

import pytest
import torch

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import AttentionShape, make_plan, needs_lse, pipelined_groups
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.topology import Topology

H200_UNITS = 132


def shape(rows: int, heads: int, num_ranks: int = 2) -> AttentionShape:
    lengths = (rows // num_ranks,) * num_ranks
    return AttentionShape(1, lengths, lengths, heads, heads, 128, torch.bfloat16)


@pytest.mark.parametrize(
    ("machines", "has_lse", "num_units", "expected"),
    [
        (1, True, 0, "torus"),
        (2, True, 0, "torus"),
        (2, True, H200_UNITS, "torus"),
        (1, True, H200_UNITS, "pipelined"),
        (2, False, 0, "pipelined"),
    ],
)
def test_auto(machines: int, has_lse: bool, num_units: int, expected: str) -> None:
    plan = make_plan(
        shape(4608, 24), Topology.split(2, machines), has_lse=has_lse, num_units=num_units
    )
    assert plan.schedule.name == expected


@pytest.mark.parametrize(
    ("rows", "heads", "num_units", "expected"),
    [
        (4608, 24, H200_UNITS, (2, 0)),  # 36 tiles a head: 4 heads fill the device, too many of 12
        (16896, 24, H200_UNITS, (3, 1)),
        (9000, 24, H200_UNITS, (3, 2)),  # 71 tiles a head
        (37376, 4, H200_UNITS, (2, 0)),
        (37376, 24, 0, (2, 0)),
        (37376, 2, 0, (1, 0)),  # one head a rank
    ],
)
def test_head_groups(rows: int, heads: int, num_units: int, expected: tuple[int, int]) -> None:
    assert pipelined_groups(shape(rows, heads), Mesh(torus=2), num_units) == expected


def test_which_schedules_merge() -> None:
    assert needs_lse(build("torus", Mesh(2, 1, 2)))
    assert not needs_lse(build("pipelined", Mesh(2, 1, 2), groups_per_rank=2))


def test_a_schedule_that_merges_needs_an_lse() -> None:
    with pytest.raises(ValueError, match=r"schedule .torus. merges .* use schedule="):
        make_plan(shape(64, 4), Topology.split(2, 2), schedule="torus", has_lse=False)
