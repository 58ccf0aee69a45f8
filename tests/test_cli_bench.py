"""`swiftfusion bench layer`: arguments, a run on CPU ranks, what is made of the numbers."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from swiftfusion_xdit.cli import bench_launch
from swiftfusion_xdit.cli import bench_report as reports
from swiftfusion_xdit.cli.bench_config import SHAPES, BenchConfig, Case, Shape, parse_shapes
from swiftfusion_xdit.cli.bench_parts import Orders
from swiftfusion_xdit.cli.main import main

CPU = ("bench", "layer", "--device", "cpu")


def config(**changes: Any) -> BenchConfig:
    arguments: dict[str, Any] = {
        "device": "cpu",
        "shapes": (Shape("small", 1, 64, 4, 16),),
        "strategies": ("usp", "torus"),
        "schedules": ("torus", "pipelined"),
        "backends": ("cpu",),
        "groups": (),
        "meshes": (None,),
        "ranks": 2,
        "machines": 1,
        "transports": ("auto",),
        "dtype": "float32",
        "graph": False,
        "stock_graph": False,
        "layer_graphs": False,
        "parts": False,
        "tcp": False,
        "rounds": 1,
        "seconds": 1.0,
        "timeout_s": 60.0,
    }
    return BenchConfig(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "flux512"], "--shapes"),
        (["--shapes", "1,64,4"], "--shapes"),
        (["--shapes", "1,64,0,16"], "--shapes"),
        (["--shapes", "1,64,1,16"], "1 heads"),
        (["--shapes", "1,64,4,16,1,64,4,16"], "once"),
        (["--strategies", "best"], "--strategies"),
        (["--strategies", "torus,torus"], "--strategies"),
        (["--schedules", "usp"], "--schedules"),
        (["--groups", "2,few"], "--groups"),
        (["--groups", "0"], "--groups"),
        (["--backends", "fa4"], "--backends"),
        (["--mesh", "torus=3"], "--mesh"),
        (["--transport", "mail"], "--transport"),
        (["--transport", "shm,shm"], "--transport"),
        (["--ranks", "1"], "--ranks"),
        (["--ranks", "4", "--machines", "3"], "--machines"),
        (["--rounds", "0"], "--rounds"),
        (["--seconds", "0"], "--seconds"),
        (["--timeout", "nan"], "--timeout"),
        (["--dtype", "int8"], "--dtype"),
        (["--graph"], "--graph"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*CPU, *arguments]) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message, message


def test_gpus_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "layer", "--device", "cuda", "--ranks", "99"]) == 2
    assert "one GPU each" in capsys.readouterr().err


def test_shapes_by_name_and_by_number() -> None:
    named, custom = parse_shapes("wan480, 2,100,6,64")
    assert named == SHAPES["wan480"] and named.rows == 32760
    assert (custom.batch, custom.rows, custom.heads, custom.head_dim) == (2, 100, 6, 64)


def test_cases_cover_every_degree_schedule_and_mesh() -> None:
    names = [case.name for case in config(ranks=4, machines=2, strategies=("usp", "tas")).cases()]
    assert len(names) == len(set(names))
    assert [name for name in names if " u2 r2" in name and "combined" not in name]
    assert [name for name in names if " u1 r4" in name] and [
        name for name in names if "tas" in name
    ]
    ours = config(strategies=("torus",), meshes=(None, "ring=2"), parts=True).cases()
    assert [case.kind for case in ours] == ["floor", *["torus"] * 4, *["comm"] * 4]
    assert Case("torus", "cpu", schedule="pipelined", mesh="ring=2") in ours
    over = [c.name for c in config(strategies=("torus",), transports=("shm", "auto")).cases()]
    assert "torus/torus cpu over shm" in over and "torus/torus cpu over auto" in over
    on_gpu = {"device": "cuda", "backends": ("fa4",), "dtype": "bfloat16", "schedules": ("auto",)}
    (_, default) = config(**on_gpu, strategies=("torus",)).cases()
    assert (default.name, default.layer_graphs) == ("torus/auto fa4", None)
    (_, without, again) = config(**on_gpu, strategies=("torus",), layer_graphs=True).cases()
    assert (without.name, without.layer_graphs) == ("torus/auto fa4 without layer graphs", False)
    assert (again.name, again.layer_graphs) == ("torus/auto fa4 with layer graphs", True)
    grouped = [c.groups for c in config(strategies=("torus",), groups=(1, 3)).cases()]
    assert grouped == [None, None, 1, 3, None, 1, 3]  # floor, torus and pipelined thrice
    across = config(strategies=("torus",), groups=(3,), machines=2, schedules=("torus",)).cases()
    assert [c.groups for c in across] == [None, None]  # a torus axis has no head groups


@pytest.mark.parametrize("number", [1, 2, 3, 5, 12])
def test_nothing_runs_twice_running_after_the_same(number: int) -> None:
    items, turns = [f"case {i}" for i in range(number)], Orders()
    orders = [turns.draw(items) for _ in range(8)]
    assert all(sorted(order) == sorted(items) for order in orders)
    run = [item for order in orders for item in order]
    before: dict[str, str] = {}
    for item, after in zip(run[1:], run, strict=False):
        assert number <= 2 or before.get(item) != after
        before[item] = after
    again = Orders()
    assert orders == [again.draw(items) for _ in range(8)], "all ranks take the same orders"


def test_run_on_cpu_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of the second shape do not divide: ours runs it, xDiT cannot, and says so."""
    path = tmp_path / "results" / "layer.json"
    shapes = "1,64,4,16,2,37,5,8"
    arguments = ["--shapes", shapes, "--rounds", "2", "--parts", "--json", str(path)]
    assert main([*CPU, *arguments, "--strategies", "usp,tas,torus", "--machines", "2"]) == 0
    shown = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["versions"]["torch"] and report["hardware"]["cpu"] and report["date"]
    even, uneven = report["shapes"]
    for shape in (even, uneven):
        assert shape["rounds"] == 2 and shape["shape"]["name"] in shown
        for case in shape["cases"]:
            assert case["name"] in shown
            if shape is uneven and case["kind"] in ("usp", "tas"):
                assert "do not divide" in case["failure"] and case["eager"] is None
                continue
            assert case["failure"] is None, case
            assert len(case["eager_ms"]) == 2 and min(case["eager_ms"]) > 0
            assert case["eager_of_floor"] > 0
            assert case["kind"] == "comm" or case["relative_error"] < 1e-5, case
            if shape is even and case["kind"] == "torus":
                # Half of the heads of the own rows of q, k, v, and as much output.
                assert case["bytes_across"] == 4 * (64 // 2) * (4 // 2) * 16 * 4
    assert list(path.parent.iterdir()) == [path]


def ranks_that_fail(rank: int, *_: Any) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_a_rank_that_dies_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_launch, "_serve", ranks_that_fail)
    with pytest.raises(bench_launch.BenchError, match=r"rank 1 ended.*SIGKILL"):
        bench_launch.run_ranks(config(), lambda kind, value: None)


def ranks_that_wait(*_: Any) -> None:
    signal.pause()


def test_a_run_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_launch, "_serve", ranks_that_wait)
    with pytest.raises(bench_launch.BenchError, match=r"ranks 0, 1 were not done within 0\.1 s"):
        bench_launch.run_ranks(config(timeout_s=0.1), lambda kind, value: None)


def test_ranks_on_hosts_of_their_own_for_nccl() -> None:
    changes: dict[str, Any] = {"device": "cuda", "backends": ("fa4",), "dtype": "bfloat16"}
    playing = config(**changes, machines=2, tcp=True)
    first, second = (bench_launch.rank_environment(rank, playing) for rank in range(2))
    assert first["NCCL_HOSTID"] != second["NCCL_HOSTID"] and first["NCCL_NET"] == "Socket"
    assert "NCCL_HOSTID" not in bench_launch.rank_environment(0, config(**changes))


def case(kind: str, backend: str, **found: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": f"{kind} [{backend}]",
        "backend": backend,
        "relative_error": 1e-3,
        "failure": None,
        "graph_failure": None,
        "graph_same_bits": True,
        "predicted_of_floor": None,
        "bytes_across": 0,
        "eager_ms": [],
        "graph_ms": [],
        "host_us": [],
        **found,
    }


FOUND = {
    "shape": {"name": "made", "batch": 1, "rows": 8, "heads": 2, "head_dim": 4},
    "rounds": 3,
    "cases": [
        case("floor", "fa4", eager_ms=[1.0, 2.0, 4.0], graph_ms=[1.5, 1.5, 1.5], host_us=[9.0] * 3),
        case("floor", "cudnn", eager_ms=[3.0, 3.0, 3.0], host_us=[7.0] * 3),
        case("usp", "cudnn", eager_ms=[6.0, 3.0, 3.0], host_us=[50.0] * 3),
        case("usp", "fa4", failure="AttributeError: no LSE", relative_error=None),
        case(
            "torus",
            "fa4",
            eager_ms=[3.0] * 3,
            graph_ms=[1.5, 1.8, 2.1],
            host_us=[20.0] * 3,
            predicted_of_floor=1.125,
            bytes_across=12_340_000,
        ),
    ],
}


def test_ratios_are_to_the_fastest_floor_round_by_round() -> None:
    summary = reports.summarise(FOUND)
    floor, cudnn, usp, failed, ours = summary["cases"]
    assert summary["floor"] == "fa4 graph"
    assert (floor["graph_of_floor"], floor["eager_of_floor"]) == (1.0, 1.3333)
    assert (usp["eager_of_floor"], usp["eager_of_own_floor"]) == (2.0, 1.0)
    assert (ours["eager_of_floor"], ours["graph_of_floor"]) == (2.0, 1.2)
    assert cudnn["graph"] is None and failed["eager"] is None and failed["eager_of_floor"] is None
    assert reports.best(summary, ("torus",)) == (1.2, "torus [fa4], graph")
    assert reports.best(summary, ("tas",)) is None


def test_table_shows_every_case_and_why_one_is_missing() -> None:
    console = Console(width=150, record=True, markup=False)
    table = reports.layer_table(reports.summarise(FOUND), dtype="bfloat16", ranks=2)
    console.print(table)
    text = console.export_text()
    for expected in ("torus [fa4]", "AttributeError: no LSE", "host us", "graph ms", "1.200", "20"):
        assert expected in text, text
    assert "predicted 1.125, 12.3 MB across" in " ".join(text.split())


def test_only_our_own_failures_count() -> None:
    assert reports.broken(reports.summarise(FOUND)) == []
    found = copy.deepcopy(FOUND)
    found["cases"][4].update(graph_failure="wrong: relative error 0.5")  # type: ignore[index]
    (line,) = reports.broken(reports.summarise(found))
    assert "made, torus [fa4]" in line and "relative error 0.5" in line


def test_no_file_is_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    reports.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        reports.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
