"""The worked example in docs/design.md is what the builder builds."""

from __future__ import annotations

from pathlib import Path

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule import build

DESIGN = Path(__file__).parent.parent / "docs" / "design.md"


def test_worked_example_lists_every_step_of_rank_0() -> None:
    rows = [line for line in DESIGN.read_text().splitlines() if line.startswith("| ")]
    steps = build("torus", Mesh(torus=2, ulysses=1, ring=2)).programs[0].steps
    for index, step in enumerate(steps):
        assert f"| {index} | {step.stream} | {step} |" in rows
    assert f"| {len(steps)} |" not in "\n".join(rows)
