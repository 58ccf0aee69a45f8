"""Slots are laid out for what is put into them, and for nothing else."""

from __future__ import annotations

import pytest
import torch

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import NUM_PARITIES, AttentionShape, Plan
from swiftfusion_xdit.schedule import build

ROWS, HEADS, DIM = 128, 8, 64


def rows_of_all_heads(plan: Plan) -> float:
    """Symmetric memory of a layer, in units of one rank's rows with all heads."""
    return plan.symmetric_bytes / NUM_PARITIES / (ROWS * HEADS * DIM * 2)


@pytest.mark.parametrize(
    ("schedule", "mesh", "groups", "expected"),
    [
        # The keys and values of the other rank; the own ones are read from the input.
        ("torus", Mesh(ring=2), 1, 2.0),
        # Half of the heads: others' q, all rows of k and v; and o of the other half.
        ("folded", Mesh(torus=2), 1, 0.5 + 2 * 1.0 + 0.5),
        ("torus", Mesh(torus=2), 1, 0.5 + 2 * 0.5 + 0.5),
        ("pipelined", Mesh(ulysses=2), 2, 0.5 + 2 * 1.0 + 0.5),
        # One call over all rows needs the own queries among the others'.
        ("whole_sequence", Mesh(ulysses=2), 2, 1.0 + 2 * 1.0 + 0.5),
    ],
)
def test_slots_hold_what_arrives(schedule: str, mesh: Mesh, groups: int, expected: float) -> None:
    shape = AttentionShape(1, (ROWS,) * 2, (ROWS,) * 2, HEADS, HEADS, DIM, torch.bfloat16)
    plan = Plan(shape, build(schedule, mesh, groups_per_rank=groups))
    # The result's place has columns for all heads, of which peers fill the others'.
    own_columns = 0.5 if mesh.ring == 1 else 0.0
    assert rows_of_all_heads(plan) == pytest.approx(expected + own_columns)
