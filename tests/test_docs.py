"""The worked example in docs/design.md is what the builder builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftfusion_xdit import envs
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.xdit.args import FLAGS

DESIGN = Path(__file__).parent.parent / "docs" / "design.md"


def test_worked_example_lists_every_step_of_rank_0() -> None:
    rows = [line for line in DESIGN.read_text().splitlines() if line.startswith("| ")]
    steps = build("torus", Mesh(torus=2, ulysses=1, ring=2)).programs[0].steps
    for index, step in enumerate(steps):
        assert f"| {index} | {step.stream} | {step} |" in rows
    assert f"| {len(steps)} |" not in "\n".join(rows)


README = (Path(__file__).parent.parent / "README.md").read_text()
COMPATIBILITY = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()


@pytest.mark.parametrize("flag", FLAGS)
def test_readme_has_every_flag_with_its_variable(flag: str) -> None:
    (line,) = (line for line in README.splitlines() if line.startswith(f"| `--sp-{flag}` |"))
    assert f"`SWIFTFUSION_SP_{flag.upper()}`" in line
    choices = {
        "strategy": envs.STRATEGIES,
        "transport": envs.TRANSPORTS,
        "schedule": envs.SCHEDULES,
        "fallback": envs.FALLBACKS,
        "wire": envs.WIRES,
    }
    for choice in choices.get(flag, ()):
        assert f"`{choice}`" in line


@pytest.mark.parametrize("name", [name for name in envs.VARIABLES if not name.startswith("SP_")])
def test_readme_has_every_other_variable(name: str) -> None:
    assert f"`SWIFTFUSION_{name}`" in README


def test_readme_counts_the_models() -> None:
    table = COMPATIBILITY.partition("## Models")[2].partition("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert f"lists {len(rows)} models" in README
