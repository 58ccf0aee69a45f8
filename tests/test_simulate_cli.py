"""`swiftfusion simulate`: a table, a picture, a trace, and errors that name the argument."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swiftfusion_xdit.cli.main import main

COMMON = ["simulate", "--topology", "p4de", "--machines", "2", "--model", "flux", "--size", "2048"]


def test_prints_the_step_beside_usp(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMON, "--schedule", "folded", "--markdown"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| usp torus=1,ulysses=8,ring=2",
        "| folded torus=2,ulysses=4,ring=2",
    ]


def test_auto_is_the_fastest_of_the_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    def step_ms(*options: str) -> float:
        assert main([*COMMON, "--markdown", *options]) == 0
        return float(capsys.readouterr().out.splitlines()[-1].split(" | ")[2])

    times = [step_ms("--schedule", name) for name in ("torus", "folded", "pipelined")]
    assert step_ms() == min(times)


@pytest.mark.parametrize("transport", ["one-sided", "nccl"])
def test_draws_every_rank_of_a_small_cluster(tmp_path: Path, transport: str) -> None:
    pytest.importorskip("matplotlib")
    picture, trace = tmp_path / "layer.png", tmp_path / "layer.json"
    small = [*COMMON, "--gpus-per-machine", "4", "--transport", transport]
    assert main([*small, "--timeline", str(picture), "--trace", str(trace)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "link nic", "link nvlink"} <= names
    assert {event["pid"] for event in events} == set(range(8))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--topology", "p9"], "p4de"),
        (["--model", "flux9"], "model must be one of"),
        (["--size", "big"], "--size must look like"),
        (["--size", "1000"], "multiple of 16"),
        (["--machines", "0"], "num_machines"),
        (["--mesh", "torus=3"], "!= sp group size"),
        (["--groups", "2"], "--groups needs --schedule torus, pipelined or fused"),
        (["--schedule", "pipelined", "--groups", "99"], "--groups must be 1 to"),
        (["--schedule", "torus", "--groups", "2"], "--groups must be 1 to 1 on torus="),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--frames", "9"], "frames must be 1"),
    ],
)
def test_wrong_arguments_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMON, *options]) == 2
    assert message in capsys.readouterr().err
