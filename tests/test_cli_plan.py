"""`swiftfusion plan` ranks strategies and meshes, and prints a command that runs the best."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest

from swiftfusion_xdit.cli import plan as command
from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.planner import WORTHWHILE, plan
from swiftfusion_xdit.simulate.sizes import LayerShape

SMALL = ("--gpu", "h100", "--machines", "2", "--gpus-per-machine", "4", "--size", "1024")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["plan", *arguments])
    return int(args.run(args))


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_json_ranks_every_strategy_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *SMALL)
    assert {entry["strategy"] for entry in found["candidates"]} == {"usp", "tas", "torus"}
    times = [entry["step_ms"] for entry in found["candidates"]]
    assert times == sorted(times)
    for entry in found["candidates"]:
        assert Mesh(**entry["mesh"]).size == 8
        assert 0 < entry["floor_us"] <= entry["layer_us"]
        assert (entry["symmetric_bytes"] > 0) == (entry["strategy"] == "torus"), entry
        assert entry["bytes_across_per_layer"] > 0
    assert all(entry["reason"] for entry in found["not_predicted"])
    assert (found["model"], found["rows"], found["layers"]) == ("flux", 4608, 57)


def test_bytes_across_are_those_of_the_papers_formulas(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = report(capsys, *SMALL)
    elements = 4608 * 24 * 128  # B L H D
    torus, usp = 4 * (2 - 1) / 2**2, 2 * (2 - 1) / 2
    for entry in found["candidates"]:
        of_machine = usp if entry["strategy"] == "usp" else torus
        if entry["mesh"]["ulysses"] == 4 or entry["strategy"] != "usp":
            expected = of_machine * elements * 2 / 4  # bytes, of one of 4 GPUs
            assert entry["bytes_across_per_layer"] == pytest.approx(expected), entry


def test_the_command_runs_the_best_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *SMALL)
    words = shlex.split(found["command"])
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "xdit" and flags["--nnodes"] == "2" and flags["--nproc_per_node"] == "4"
    assert int(flags["--ulysses_degree"]) * int(flags["--ring_degree"]) == 8
    best = found["candidates"][0]
    assert flags["--sp-strategy"] == best["strategy"] == "torus"
    assert Mesh.parse(flags["--sp-mesh"]).as_dict() == best["mesh"]
    if best["head_groups_per_rank"] == 1:
        assert flags["--sp-schedule"] == best["schedule"]
    assert flags["--height"] == flags["--width"] == "1024"


@pytest.mark.parametrize(("machines", "gpus", "size"), [(2, 1, 3072), (2, 4, 2048), (4, 2, 2048)])
def test_what_has_no_flag_is_found_again_on_the_mesh_of_the_command(
    machines: int, gpus: int, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--machines", str(machines), "--gpus-per-machine", str(gpus), "--gpu", "a100")
    found = report(capsys, *where, "--size", str(size))
    best = found["candidates"][0]
    words = shlex.split(found["command"])
    assert best["head_groups_per_rank"] > 1 and "--sp-schedule" not in words
    cluster = preset("p4de", num_machines=machines, gpus_per_machine=gpus)
    shape = LayerShape.even(cluster.num_ranks, sequence=found["rows"], num_heads=24, head_dim=128)
    mesh = Mesh.parse(words[words.index("--sp-mesh") + 1])
    again = plan(cluster, shape, mesh).prediction
    assert again.layer_us <= best["layer_us"] / (1 - WORTHWHILE)


def test_a_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMALL) == 0
    printed = capsys.readouterr().out
    assert "flux, 4608 rows, on 2 x 4 h100 (p5)" in printed
    assert "best" in printed and "xdit --nnodes 2" in printed
    assert run(*SMALL, "--all") == 0
    assert len(capsys.readouterr().out.splitlines()) > len(printed.splitlines())


def test_videos_and_the_papers_rule(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--gpu", "h200", "--gpus-per-machine", "2", "--model", "cogvideox")
    found = report(capsys, *arguments, "--frames", "49", "--policy", "paper")
    assert found["rows"] == 226 + 13 * 48 * 85
    torus = [entry for entry in found["candidates"] if entry["strategy"] == "torus"]
    assert [entry["mesh"] for entry in torus] == [Mesh(ulysses=2).as_dict()]
    assert "cogvideox_example.py" in found["command"] and "--num_frames 49" in found["command"]


def test_fixed_degrees_hold_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *SMALL, "--degrees", "ring=4")
    assert {entry["mesh"]["ring"] for entry in found["candidates"]} == {4}


def test_a_yaml_file_is_a_topology(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("preset: h200-2\nnum_machines: 1\n", encoding="utf-8")
    assert report(capsys, "--topology", str(path), "--size", "1024")["cluster"] == "lab"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "v100"), "gpu must be one of a100"),
        (("--topology", "p3"), "topology must be one of"),
        (("--topology", "p5", "--gpu", "a100"), "give it or --gpu, not both"),
        (("--machines", "0"), "num_machines must be a positive integer, got 0"),
        (("--model", "sdxl"), "model must be one of"),
        (("--size", "1000"), "must be a positive multiple of 16"),
        (("--batch", "0"), "--batch must be at least 1"),
        (("--degrees", "ring=5"), r"ring(5) = 5 does not divide the 32 GPUs"),
        (("--degrees", "tile=5"), "mesh must look like"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert message in output.err and len(output.err.splitlines()) == 1
    assert not output.out
