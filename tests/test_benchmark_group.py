"""The command that tries out a group of many ranks: what it runs, and how it tells what failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import group
from swiftfusion_xdit.cli import main as cli
from swiftfusion_xdit.mesh import Mesh


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_meshes_fit_the_group_and_are_told_once(ranks: int) -> None:
    found = [Mesh.parse(text) for text in group.meshes(ranks)]
    assert len(set(found)) == len(found)
    assert {Mesh(ring=ranks), Mesh(ulysses=ranks), Mesh(torus=ranks)} <= set(found)
    for mesh in found:
        mesh.require(num_ranks=ranks)


def test_machines_share_the_ranks_evenly() -> None:
    assert group.machine_counts(8) == [1, 2, 4, 8]
    assert group.machine_counts(6) == [1, 2]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_commands_are_those_of_the_command_line(on_gpu: bool, tmp_path: Path) -> None:
    plan = group.stages(8, tmp_path, on_gpu=on_gpu)
    names = [stage.name for stage in plan]
    assert len(set(names)) == len(names)
    assert ("tcp_4_hosts" in names) == ("ten thousand layers" in names) == on_gpu
    parser = cli.build_parser()
    for stage in plan:
        if "swiftfusion_xdit" in stage.command:
            args = parser.parse_args(stage.command[3:])
            assert args.ranks == 8 and args.json.parent == tmp_path
        elif "pytest" in stage.command:
            assert any(Path(word).exists() for word in stage.command if word.endswith(".py"))


@pytest.mark.parametrize(
    ("script", "seconds", "ended"),
    [
        ("print('fine')", 60, "passed"),
        ("raise SystemExit(3)", 60, "status 3, see stage.log"),
        ("import time; time.sleep(600)", 1, "no end within 1 s"),
    ],
)
def test_how_a_stage_ends_is_told(script: str, seconds: int, ended: str, tmp_path: Path) -> None:
    stage = group.Stage("stage", (sys.executable, "-c", script), seconds)
    found, took_s = group.run(stage, tmp_path / "stage.log")
    assert found == ended and took_s < 60
