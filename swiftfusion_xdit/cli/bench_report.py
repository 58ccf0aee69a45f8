"""What `swiftfusion bench layer` found, summed up, as a table and as a file."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 150  # of tables that are written to a file or a pipe
METHOD = {
    "turns": (
        "All cases of a shape, eager and as graphs, take turns in each round, in an order of its "
        "own: none comes after the one that it came after in the round before, where that can be, "
        "and the rest is drawn. A turn is a barrier, then layers_per_turn layers back to back; the "
        "slowest rank's time counts, divided by the layers. CUDA events on GPUs, the host's clock "
        "on CPUs."
    ),
    "graph": (
        "layers_per_turn consecutive layers, even and odd ones in turn, captured in one CUDA graph;"
        " a turn is one replay."
    ),
    "layer graphs": (
        "Eager layers of torus are CUDA graphs of their own where SWIFTFUSION_LAYER_GRAPHS says so,"
        " by default auto; without and with: all or none, whatever it says."
    ),
    "floor": (
        "The local kernel alone on H / ranks heads and all rows, on all ranks at once. Ratios are "
        "to the fastest floor of the shape, over kernels and over eager and graph; the median over "
        "rounds of the two times of a round, divided."
    ),
    "predicted": "The planner's layer over its floor, where it chose the mesh or the schedule.",
    "across": "What the rank that sends most sends to other machines in a layer, as counted.",
    "error": "Norm of the difference to attention in fp64 over its norm, on 32 query rows a rank.",
    "host": "Microseconds that the host takes to enqueue one eager layer, on the slowest rank.",
}


def tables_console() -> Console:
    """Where benchmarks print their tables."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile; one sample is all three."""
    if len(samples) == 1:
        return dict.fromkeys(("q1", "median", "q3"), samples[0])
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"q1": round(q1, 5), "median": round(median, 5), "q3": round(q3, 5)}


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """Add medians, quartiles and ratios to what the ranks measured of one shape."""
    cases = [dict(case) for case in found["cases"]]
    floors: dict[str, tuple[float, str, list[float]]] = {}
    for case in cases:
        for mode in ("eager", "graph"):
            samples = case[f"{mode}_ms"]
            case[mode] = spread(samples) if samples else None
            if case["kind"] == "floor" and samples:
                floor = (statistics.median(samples), f"{case['backend']} {mode}", samples)
                floors[case["backend"]] = min(floors.get(case["backend"], floor), floor)
        case["host"] = spread(case["host_us"]) if case["host_us"] else None
    best = min(floors.values(), default=None)
    for case in cases:
        own = floors.get(case["backend"])
        for mode in ("eager", "graph"):
            samples = case[f"{mode}_ms"]
            case[f"{mode}_of_floor"] = _ratio(samples, best)
            case[f"{mode}_of_own_floor"] = _ratio(samples, own)
    return {**found, "floor": best[1] if best else None, "cases": cases}


def _ratio(samples: list[float], floor: tuple[float, str, list[float]] | None) -> float | None:
    if floor is None or not samples:
        return None
    pairs = zip(samples, floor[2], strict=True)
    return round(statistics.median(mine / base for mine, base in pairs), 4)


def best(summary: dict[str, Any], kinds: Sequence[str]) -> tuple[float, str] | None:
    """The smallest ratio to the floor among cases of these kinds, and whose it is."""
    ratios = [
        (case[f"{mode}_of_floor"], f"{case['name']}, {mode}")
        for case in summary["cases"]
        for mode in ("eager", "graph")
        if case["kind"] in kinds and case[f"{mode}_of_floor"] is not None
    ]
    return min(ratios, default=None)


def layer_table(summary: dict[str, Any], *, dtype: str, ranks: int) -> Table:
    """One shape's results."""
    shape = summary["shape"]
    on_gpu = any(case["host"] for case in summary["cases"])
    with_graph = any(case["graph"] or case["graph_failure"] for case in summary["cases"])
    table = Table(
        title=f"{shape['name']}: B={shape['batch']} S={shape['rows']} H={shape['heads']} "
        f"D={shape['head_dim']} {dtype}, {ranks} ranks, {summary['rounds']} rounds; "
        f"floor: {summary['floor'] or 'none'}"
    )
    table.add_column("case")
    modes = ("eager", "graph") if with_graph else ("eager",)
    for mode in modes:
        for heading in (f"{mode} ms", "quartiles", "/ floor"):
            table.add_column(heading, justify="right")
    if on_gpu:
        table.add_column("host us", justify="right")
    table.add_column("error", justify="right")
    table.add_column("note", overflow="fold")
    kind = None
    for case in summary["cases"]:
        if kind is not None and case["kind"] != kind:
            table.add_section()
        kind = case["kind"]
        cells = [case["name"], *(cell for mode in modes for cell in _times(case, mode))]
        if on_gpu:
            cells.append(f"{case['host']['median']:.0f}" if case["host"] else "")
        error = case["relative_error"]
        said = "; ".join(text for text in (note(case), facts(case)) if text)
        table.add_row(*cells, "" if error is None else f"{error:.1e}", said)
    return table


def _times(case: dict[str, Any], mode: str) -> tuple[str, str, str]:
    times, ratio = case[mode], case[f"{mode}_of_floor"]
    if times is None:
        return "", "", ""
    digits = 1 if times["median"] >= 10 else 3
    low, middle, high = (f"{times[key]:.{digits}f}" for key in ("q1", "median", "q3"))
    return middle, f"{low} - {high}", "" if ratio is None else f"{ratio:.3f}"


def note(case: dict[str, Any]) -> str:
    """What is wrong with a case, or different about it; empty if nothing is."""
    if case["failure"]:
        return str(case["failure"])
    if case["graph_failure"]:
        return f"graph: {case['graph_failure']}"
    if case["graph_same_bits"] is False and case["kind"] != "comm":
        return "graph differs from eager in the last bits"
    return ""


def facts(case: dict[str, Any]) -> str:
    """What the planner predicted, and what a rank sends to other machines, where that is known."""
    predicted, num_bytes = case["predicted_of_floor"], case["bytes_across"]
    parts = [f"predicted {predicted:.3f}"] if predicted is not None else []
    parts += [f"{num_bytes / 1e6:.1f} MB across"] if num_bytes else []
    return ", ".join(parts)


def broken(summary: dict[str, Any]) -> list[str]:
    """The cases that this package answers for and that failed or gave a wrong result."""
    return [
        f"{summary['shape']['name']}, {case['name']}: {note(case)}"
        for case in summary["cases"]
        if case["kind"] in ("floor", "torus", "comm") and (case["failure"] or case["graph_failure"])
    ]


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write ``report`` in one step: a run that is ended leaves the file of the shape before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
