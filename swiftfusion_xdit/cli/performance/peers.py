"""Other projects' layers beside ours, of `peer_layer.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

from swiftfusion_xdit.cli.performance.section import (
    Bar,
    Section,
    bar_over_floor,
    fastest_of,
    gpus,
    lower,
    origin,
    schedule_of,
)


def peer_section(name: str, report: dict[str, Any]) -> Section:
    """`peer_layer`: each project's fastest mode beside ours."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for found in report["shapes"]:
        shape = found["shape"]["name"]
        ours = None
        for label in ("torus", "xDiT", *report["peers"]):
            fastest = fastest_of(found["cases"], partial(_is_of, label))
            if fastest is None:
                continue
            case, mode = fastest
            ms, ratio = case[mode]["median"], case[f"{mode}_of_floor"]
            if label == "torus":
                ours = ms
            what = schedule_of(case) if case["plan"] else case["name"].removeprefix(f"{label} ")
            cells = (f"{ms:.3f}", f"{ratio:.2f}", "" if ours is None else f"{ms / ours:.2f}")
            rows.append((shape, label, f"{what}, {mode}", *cells))
            bars.append(bar_over_floor(shape, label, case, mode))
    peers = report["peers"].items()
    versions = [f"{each} {peer['version']}" for each, peer in peers if peer["version"]]
    reasons = {each: peer["not_run"] for each, peer in peers if peer["not_run"]}
    missing = [f"{each} ({why})" for each, why in {**reasons, **report["not_run"]}.items()]
    return Section(
        name=name,
        title=f"Other projects: one attention layer on {gpus(report)}",
        text=f"Of each project the fastest of the modes that ran and are exact; `{name}.json` has "
        f"all. Ours and xDiT ran with {' and '.join(report['settings']['backends'])} alone. The "
        f"floor is {lower(report['method']['floor'])} {'; '.join(versions)}. Not run: "
        f"{'; '.join(missing)}. {origin(name, report)}",
        heading=("shape", "project", "which", "ms", "/ floor", "/ torus"),
        rows=tuple(rows),
        unit="time over the local kernel alone",
        bars=tuple(bars),
        line=1.0,
    )


def _is_of(project: str, case: dict[str, Any], mode: str) -> bool:
    kind = {"torus": "torus", "xDiT": "usp"}.get(project, "peer")
    return case["kind"] == kind and (kind != "peer" or case["name"].startswith(f"{project} "))
