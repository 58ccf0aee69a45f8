"""`swiftfusion bench report`: what it makes of files of results, and that the page is current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swiftfusion_xdit.cli import performance
from swiftfusion_xdit.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"


def test_the_page_is_what_the_results_give() -> None:
    command = "swiftfusion bench report benchmarks/results --output docs/performance"
    sections = performance.read(RESULTS)
    assert PAGE.read_text(encoding="utf-8") == performance.page(sections, "performance"), command
    pictures = {f"{section.name}.png" for section in sections}
    pictures |= {path.name for section in sections for _, path in section.timelines}
    assert {path.name for path in PAGE.with_suffix("").iterdir()} == pictures, command


def quartiles(median: float) -> dict[str, float]:
    return {"q1": median - 0.1, "median": median, "q3": median + 0.2}


def layer_case(kind: str, name: str, eager: float, graph: float | None, **more: Any) -> dict:
    case = {
        "kind": kind,
        "name": name,
        "backend": "fa4",
        "schedule": None,
        "plan": None,
        "failure": None,
        "eager": quartiles(eager),
        "graph": None if graph is None else quartiles(graph),
        "eager_of_floor": eager / 2,
        "graph_of_floor": None if graph is None else graph / 2,
    }
    return case | more


def layer_report() -> dict[str, Any]:
    """A floor of 2 ms; xDiT's two ways; ours as planned, and a better schedule."""
    plan = "strategy torus, 1 machines, mesh ring=2, schedule {}, 5 bytes of symmetric memory"
    cases = [
        layer_case("floor", "floor: fa4 alone", 2.2, 2.0),
        layer_case("usp", "xDiT usp u2 r1 FLASH_4", 5.0, None),
        layer_case("usp", "xDiT usp u1 r2 FLASH_4", 4.0, None),
        layer_case("torus", "torus/auto fa4", 3.0, 2.5, schedule="auto", plan=plan.format("torus")),
        layer_case("torus", "torus/fused fa4", 2.8, 2.4, plan=plan.format("fused")),
        layer_case("torus", "torus/folded fa4", 1.0, 1.0, failure="wrong", plan=plan),
    ]
    return {
        "benchmark": "layer",
        "command": "swiftfusion bench layer",
        "date": "2026-01-02T03:04:05+00:00",
        "settings": {"device": "cuda", "transport": "nvshmem"},
        "method": {"floor": "The kernel alone."},
        "hardware": {"gpus": [{"name": "GPU"}] * 2, "gpu_links": ["NV18"]},
        "versions": {"torch": "2", "linux": "6"},
        "shapes": [{"shape": {"name": "flux1024"}, "cases": cases}],
    }


def test_other_projects_show_their_fastest_exact_mode_beside_ours(tmp_path: Path) -> None:
    report = layer_report()
    report["settings"]["backends"] = ["fa4"]
    report |= {
        "benchmark": "peer_layer",
        "peers": {
            "yunchang": {"version": "1.2", "not_run": None},
            "cache-dit": {"version": None, "not_run": "not installed"},
        },
        "not_run": {"SGLang": "too large"},
    }
    report["shapes"][0]["cases"] += [
        layer_case("peer", "yunchang ulysses fast", 1.0, 1.0, failure="wrong"),
        layer_case("lossy", "yunchang ulysses fp8", 1.0, 1.0),
        layer_case("peer", "yunchang ulysses 2", 6.0, 4.8),
    ]
    (tmp_path / "peers.json").write_text(json.dumps(report))
    (section,) = performance.read(tmp_path)
    assert section.rows == (
        ("flux1024", "torus", "fused on ring=2, fa4, graph", "2.400", "1.20", "1.00"),
        ("flux1024", "xDiT", "usp u1 r2 FLASH_4, eager", "4.000", "2.00", "1.67"),
        ("flux1024", "yunchang", "ulysses 2, graph", "4.800", "2.40", "2.00"),
    )
    assert "yunchang 1.2. Not run: cache-dit (not installed); SGLang (too large)." in section.text
    for case in report["shapes"][0]["cases"]:
        case["failure"] = case["failure"] or ("wrong" if case["kind"] == "torus" else None)
    (tmp_path / "peers.json").write_text(json.dumps(report))
    (section,) = performance.read(tmp_path)
    assert [row[-1] for row in section.rows] == ["", ""]


def step_report(ranks: int, rows: list[tuple[str, str, bool, float]]) -> dict[str, Any]:
    """Steps at one size: (kind, name, compiled, ms); the first is the best of xDiT's."""
    results = [
        {
            "kind": kind,
            "name": name,
            "compiled": compiled,
            "ms": quartiles(ms),
            "best_stock_over": quartiles(rows[0][3] / ms),
            "peak_gib": 3.0,
        }
        for kind, name, compiled, ms in rows
    ]
    report = layer_report() | {
        "benchmark": "model_step",
        "model": {"title": "Model"},
        "sizes": [{"size": "1024", "rounds": 5, "results": results}],
        "method": {"best stock /": "The best."},
    }
    report["settings"] = {"device": "cuda", "ranks": ranks}
    return report


def test_models_show_what_all_steps_gain_and_what_is_left(tmp_path: Path) -> None:
    rows = [
        ("stock", "xDiT u2", False, 12.0),
        ("ours", "torus a", False, 11.0),
        ("ours", "torus b", False, 10.0),
        ("ceiling", "none", False, 8.0),
    ]
    (tmp_path / "a.json").write_text(json.dumps(step_report(2, rows)))
    (tmp_path / "b.json").write_text(json.dumps(step_report(2, rows[:2])))
    models, a, b = performance.read(tmp_path)
    assert models.rows == (
        ("Model", "1024", "2 x GPU", "12.0", "10.0", "1.20", "1.50", "80.0", "5"),
        ("Model", "1024", "2 x GPU", "12.0", "11.0", "1.09", "", "", "5"),
    )
    assert len(models.heading) == len(models.rows[0])
    assert models.text.startswith("Mean speedup of the 2 rows: 1.15.")
    groups = [bar.group.splitlines()[-1] for bar in models.bars]
    assert groups == ["2 GPUs", "2 GPUs", "b"], "runs of the same step have bars of their own"
    assert (a.name, b.name) == ("a", "b")


def test_an_image_shows_the_ways_that_ran(tmp_path: Path) -> None:
    def row(name: str, seconds: float, **more: Any) -> dict[str, Any]:
        found = {"name": name, "strategy": name.split()[0], "plan": None, "failure": None}
        times = {"image_s": quartiles(seconds), "samples_s": [[1.0, 2.0], [3.0]], "load_s": 4.4}
        return {**found, **times, "usp_over": 5.0 / seconds, **more}

    report = {
        "benchmark": "image",
        "settings": {"device": "cuda", "size": 512, "steps": 7},
        "method": {"s / image": "As measured."},
        "weights": "Random.",
        "complete": False,
        "results": [
            row("usp u2 r1 FLASH_4", 5.0),
            row("torus FLASH_4", 4.0, plan="ring=2"),
            row("torus CUDNN", 4.0, failure="wrong"),
        ],
    }
    (tmp_path / "image.json").write_text(json.dumps({**layer_report(), **report}))
    (section,) = performance.read(tmp_path)
    assert section.rows == (
        ("512", "xDiT usp u2 r1 FLASH_4", "", "5.00", "1.00", "4", "3"),
        ("512", "torus FLASH_4", "ring=2", "4.00", "1.25", "4", "3"),
    )
    assert [bar.median for bar in section.bars] == [5000, 4000]
    assert "7 steps" in section.title and "ended before its last launch" in section.text


def test_scaling_is_over_the_same_step_on_one_gpu(tmp_path: Path) -> None:
    one = step_report(1, [("stock", "slow", False, 30.0), ("stock", "fast", False, 20.0)])
    two = [("stock", "xDiT", False, 12.5), ("ours", "torus", False, 12.0)]
    (tmp_path / "one.json").write_text(json.dumps(one))
    slower = step_report(1, [("stock", "slower", False, 25.0)])
    (tmp_path / "one_again.json").write_text(json.dumps(slower))
    (tmp_path / "two.json").write_text(json.dumps(step_report(2, two)))
    other = step_report(2, two) | {"model": {"title": "Other"}}  # has not run on one
    (tmp_path / "two_other.json").write_text(json.dumps(other))
    sections = {section.name: section for section in performance.read(tmp_path)}
    assert sections["scaling"].rows == (
        ("Model 1024", "1 x GPU", "xDiT", "20.0", "1.00", "100"),
        ("Model 1024", "1 x GPU", "xDiT", "25.0", "0.80", "80"),
        ("Model 1024", "2 x GPU", "xDiT's best", "12.5", "1.60", "80"),
        ("Model 1024", "2 x GPU", "torus", "12.0", "1.67", "83"),
    )
    assert [bar.label for bar in sections["scaling"].bars] == ["xDiT's best", "torus"]
    (tmp_path / "two_again.json").write_text(json.dumps(step_report(2, two)))
    (scaling,) = [s for s in performance.read(tmp_path) if s.name == "scaling"]
    assert len({(bar.group, bar.label) for bar in scaling.bars}) == len(scaling.bars) == 4
    for name in ("one.json", "one_again.json"):
        (tmp_path / name).unlink()
    assert "scaling" not in {section.name for section in performance.read(tmp_path)}


def test_machines_played_on_one_are_predicted_with_its_own_links(tmp_path: Path) -> None:
    report = layer_report()
    size = {"name": "flux3072", "batch": 1, "rows": 37376, "heads": 24, "head_dim": 128}
    plan = "strategy torus, 2 machines, mesh torus=2,ulysses=1,ring=1, schedule torus, 5 bytes"
    report["shapes"] = [
        {
            "shape": size,
            "cases": [
                layer_case("floor", "floor: fa4 alone", 2.0, 2.0),
                layer_case("usp", "xDiT usp u2 r1 FLASH_4", 2.4, None),
                # Ten times the floor is what the network would take that is not there.
                layer_case("torus", "torus", 2.1, 2.1, plan=plan, predicted_of_floor=10.0),
            ],
        }
    ]
    report["hardware"]["gpus"] = [{"name": "NVIDIA H200"}] * 2
    report["settings"] |= {"machines": 2, "ranks": 2, "tcp": False, "transports": ["cuda"]}
    (tmp_path / "layer.json").write_text(json.dumps(report))
    (section,) = performance.read(tmp_path)
    assert section.heading[-2:] == ("predicted / floor", "error %")
    usp, torus = (float(row[-2]) for row in section.rows)
    assert 1.0 < torus < usp < 1.2
    report["settings"]["tcp"] = True
    (tmp_path / "layer.json").write_text(json.dumps(report))
    (section,) = performance.read(tmp_path)
    assert [row[-2:] for row in section.rows] == [("", ""), ("10.00", "+852")]


def test_a_layer_shows_each_side_at_its_best_and_what_failed_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "layer.json").write_text(json.dumps(layer_report()))
    (tmp_path / "other.json").write_text("{}")
    (section,) = performance.read(tmp_path)
    assert section.rows == (
        ("flux1024", "xDiT's best", "xDiT usp u1 r2 FLASH_4", "4.000", "2.00", "2.000"),
        ("flux1024", "torus, eager", "torus on ring=2, fa4", "3.000", "1.50", "1.000"),
        ("flux1024", "torus, CUDA graph", "torus on ring=2, fa4", "2.500", "1.25", "0.500"),
        ("flux1024", "torus, best schedule", "fused on ring=2, fa4", "2.400", "1.20", "0.400"),
    )
    assert section.title == "One attention layer on 2 x GPU (NV18), nvshmem"
    assert [round(bar.median, 2) for bar in section.bars] == [2.0, 1.5, 1.25, 1.2]
    assert "torch 2. Made with\n\n    swiftfusion bench layer" in section.text


@pytest.mark.parametrize("without", [False, None], ids=["none", "as by default"])
def test_layer_graphs_are_a_way_of_their_own(without: bool | None, tmp_path: Path) -> None:
    report = layer_report()
    cases = report["shapes"][0]["cases"]
    cases.append(cases[3] | {"layer_graphs": True, "eager": quartiles(2.6), "eager_of_floor": 1.3})
    cases[-1] |= {"graph": None, "graph_of_floor": None}
    cases[3]["layer_graphs"] = without
    (tmp_path / "layer.json").write_text(json.dumps(report))
    (section,) = performance.read(tmp_path)
    ratios = {label: ratio for _, label, _, _, ratio, _ in section.rows}
    assert ratios["torus, eager"] == "1.50" and ratios["torus, layer graphs"] == "1.30"


def test_several_machines_show_what_each_step_from_usp_to_torus_brings(tmp_path: Path) -> None:
    report = layer_report()
    report["settings"] = {
        "device": "cuda",
        "machines": 2,
        "tcp": True,
        "transports": ["nccl", "nvshmem"],
    }
    (shape,) = report["shapes"]
    torus = dict(shape["cases"][3])
    shape["cases"] += [
        layer_case("tas", "xDiT tas FLASH_4", 3.5, None),
        torus | {"transport": "nccl", "predicted_of_floor": 1.4},
        layer_case("torus", "", 2.6, None, plan=torus["plan"], transport="nvshmem"),
    ]
    del shape["cases"][3:6]
    (tmp_path / "layer.json").write_text(json.dumps(report))
    (section,) = performance.read(tmp_path)
    assert section.heading[-2:] == ("predicted / floor", "error %")
    ours = "torus on ring=2, fa4"
    assert section.rows == (
        ("flux1024", "xDiT's USP", "xDiT usp u1 r2 FLASH_4", "4.000", "2.00", "2.000", "", ""),
        ("flux1024", "tas", "xDiT tas FLASH_4", "3.500", "1.75", "1.500", "", ""),
        ("flux1024", "torus, NCCL", ours, "2.500", "1.25", "0.500", "1.40", "+12"),
        ("flux1024", "torus, one-sided", ours, "2.600", "1.30", "0.600", "", ""),
    )
    assert section.title == (
        "One attention layer on 2 x GPU (NV18), played as 2 hosts, nccl and nvshmem over TCP"
    )


def test_the_command_writes_a_page_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "layer.json").write_text(json.dumps(layer_report()))
    output = tmp_path / "docs" / "speed"
    assert main(["bench", "report", str(tmp_path), "--output", str(output)]) == 0
    page, picture = output.with_name("speed.md"), output / "layer.png"
    assert capsys.readouterr().out.split() == [str(page), str(picture)]
    assert "](speed/layer.png)" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_results_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "report", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert f"RESULTS must hold files of bench layer or model_step, got {tmp_path}" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
