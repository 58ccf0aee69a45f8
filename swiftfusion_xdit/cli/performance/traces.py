"""Where a layer's time goes, of `layer_trace.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swiftfusion_xdit.cli.performance.section import (
    Bar,
    Section,
    gpus,
    lower,
    origin,
    schedule_of,
)

_TRACE_LABELS = {
    "floor": "kernel alone, {mode}",
    "usp": "xDiT's best, {mode}",
    "torus": "torus/{schedule}, {mode}",
}


def trace_section(name: str, report: dict[str, Any]) -> Section:
    """`layer_trace`: how much of a layer passes without attention."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for found in report["shapes"]:
        shape = found["shape"]["name"]
        for case in (case for case in found["cases"] if not case["failure"]):
            label = _TRACE_LABELS[case["kind"]].format(**case)
            which = schedule_of(case) if case["plan"] else case["name"]
            us = [case[f"{key}_us"]["median"] for key in ("layer", "attention", "exposed")]
            us += [case["exposed_percent"], case["over_alone_us"]]
            cells = ("" if number is None else f"{number:.1f}" for number in us)
            rows.append((shape, label, which, *cells))
            if case["kind"] != "floor":
                quartiles = (case["exposed_us"][key] for key in ("q1", "median", "q3"))
                bars.append(Bar(shape, label, *quartiles))
    exposed, over = (lower(report["method"][key]) for key in ("exposed", "over alone"))
    heading = ("shape", "way", "which", "layer us", "attention us", "exposed us", "exposed %")
    return Section(
        name=name,
        title=f"Where the time goes: one layer on {gpus(report)}",
        text=f"Exposed: {exposed} Over alone: {over} {origin(name, report)}",
        heading=(*heading, "over alone us"),
        rows=tuple(rows),
        unit="us of a layer without attention",
        bars=tuple(bars),
    )


def timelines(report: dict[str, Any], directory: Path) -> tuple[tuple[str, Path], ...]:
    """The pictures that the benchmark left beside its file, those that are still there."""
    shown = {
        f"{found['shape']['name']}, {case['name']}, {case['mode']}": directory / case["picture"]
        for found in report.get("shapes", ())
        for case in found["cases"]
        if case.get("picture")
    }
    return tuple((what, path) for what, path in shown.items() if path.exists())
