"""Attention layers, of `bench layer`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from swiftfusion_xdit import detect
from swiftfusion_xdit.cli.performance.section import (
    Bar,
    Section,
    bar_over_floor,
    fastest_of,
    gpus,
    lower,
    origin,
    planned,
    schedule_of,
)
from swiftfusion_xdit.clusters import GPUS, home_of, preset
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.planner import plan
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import nccl, one_sided


def layer_section(name: str, report: dict[str, Any]) -> Section:
    """`bench layer`: times over the floor of each shape."""
    settings = report["settings"]
    machines = settings.get("machines", 1)
    transports = settings.get("transports") or [settings.get("transport")]
    ways = _across(transports) if machines > 1 else _LAYER_CASES
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for found in report["shapes"]:
        shape = found["shape"]["name"]
        floor_ms = min(
            case[mode]["median"]
            for case in found["cases"]
            for mode in ("eager", "graph")
            if case["kind"] == "floor" and case[mode]
        )
        for label, wanted in ways.items():
            fastest = fastest_of(found["cases"], wanted)
            if fastest is None:
                continue
            case, mode = fastest
            ratio, times = case[f"{mode}_of_floor"], case[mode]
            what = case["name"] if case["kind"] in ("usp", "tas") else schedule_of(case)
            exposed_ms = times["median"] - floor_ms
            predicted = _predicted(case, found["shape"], report)
            cells = (
                f"{times['median']:.3f}",
                f"{ratio:.2f}",
                f"{exposed_ms:.3f}",
                "" if predicted is None else f"{predicted:.2f}",
                "" if predicted is None else f"{100 * (predicted / ratio - 1):+.0f}",
            )
            rows.append((shape, label, what, *cells))
            bars.append(bar_over_floor(shape, label, case, mode))
    title = f"One attention layer on {gpus(report)}"
    if machines > 1:
        title += f", played as {machines} {'hosts' if settings['tcp'] else 'machines'}"
    if transports != ["auto"]:
        title += f", {' and '.join(transports)}" + (" over TCP" if settings.get("tcp") else "")
    heading: tuple[str, ...] = ("shape", "way", "which", "ms", "/ floor", "exposed ms")
    if any(row[-1] for row in rows):
        heading += ("predicted / floor", "error %")
    return Section(
        name=name,
        title=title,
        text=f"The floor is {lower(report['method']['floor'])} Exposed: what a layer takes beyond "
        f"the floor. {origin(name, report)}",
        heading=heading,
        rows=tuple(row[: len(heading)] for row in rows),
        unit="time over the local kernel alone",
        bars=tuple(bars),
        line=1.0,
    )


def _is_planned(
    case: dict[str, Any], mode: str, wanted: str, *, layer_graphs: bool = False
) -> bool:
    return (case["schedule"], mode, bool(case.get("layer_graphs"))) == (
        "auto",
        wanted,
        layer_graphs,
    )


_LAYER_CASES: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "xDiT's best": lambda case, mode: case["kind"] == "usp",
    "torus, eager": lambda case, mode: _is_planned(case, mode, "eager"),
    "torus, layer graphs": lambda case, mode: _is_planned(case, mode, "eager", layer_graphs=True),
    "torus, CUDA graph": lambda case, mode: _is_planned(case, mode, "graph"),
    "torus, best schedule": lambda case, mode: case["kind"] == "torus",
}


def _across(transports: list[str]) -> dict[str, Callable[[dict[str, Any], str], bool]]:
    """The ways of several machines: what each step from xDiT's USP to ours brings."""

    def is_torus(two_sided: bool, case: dict[str, Any], mode: str) -> bool:
        transport = case.get("transport") or transports[0]
        return case["kind"] == "torus" and (transport == "nccl") is two_sided

    return {
        "xDiT's USP": lambda case, mode: case["kind"] == "usp",
        "tas": lambda case, mode: case["kind"] == "tas",
        "torus, NCCL": partial(is_torus, True),
        "torus, one-sided": partial(is_torus, False),
    }


def _predicted(case: dict[str, Any], shape: dict[str, Any], report: dict[str, Any]) -> float | None:
    """The simulated layer over its floor.

    As the planner said in the run; where machines were played on one, as the simulator says of the
    links that they really had, which it did not know of when older files were made.
    """
    settings, gpus = report["settings"], report["hardware"]["gpus"]
    links = report["hardware"].get("gpu_links", ())
    index = detect.gpu_index(gpus[0]["name"])
    played = settings.get("machines", 1) > 1 and not settings.get("tcp")
    if not played or index < 0 or not all(link.startswith("NV") for link in links):
        return case.get("predicted_of_floor")
    ranks = settings["ranks"]
    cluster = preset(home_of(list(GPUS)[index]), num_machines=1, gpus_per_machine=ranks)
    layer = LayerShape.even(
        ranks,
        sequence=shape["rows"],
        num_heads=shape["heads"],
        head_dim=shape["head_dim"],
        batch=shape["batch"],
    )
    transports = settings.get("transports") or [settings.get("transport")]
    two_sided = (case.get("transport") or transports[0]) == "nccl"
    if case["kind"] == "torus":
        degrees, schedule = planned(case)
        mesh, schedules = Mesh.parse(degrees), (schedule,)
    else:
        found = re.search(r" u(\d+) r(\d+)", case["name"])
        ulysses, ring = map(int, found.groups()) if found else (ranks, 1)
        mesh, schedules = Mesh(1, ulysses, ring), None
    choice = plan(
        cluster,
        layer,
        mesh,
        strategies=("torus" if case["kind"] == "torus" else "usp",),
        schedules=schedules,
        transport=nccl() if two_sided else one_sided(),
    )
    return choice.prediction.layer_us / choice.prediction.floor_us
