"""`swiftfusion bench report`: pages and pictures from the files that benchmarks left.

Reads what `bench layer --json` and `model_step.py`, `layer_trace.py` and `peer_layer.py` of
`benchmarks/` wrote. Each file becomes a section with its hardware, versions and command, a table
and a bar chart, and the timelines that lie beside it. What is slower is in it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from swiftfusion_xdit import detect
from swiftfusion_xdit.clusters import GPUS, home_of, preset
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.planner import plan
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import nccl, one_sided

COLOURS = ("#9a9a9a", "#e08e2b", "#2b7bba", "#3a9d5d", "#8a5fb0")
TEXT_COLUMNS = 3  # of every table; numbers follow
VERSIONS = ("torch", "cuda", "xfuser", "flash-attn-4", "nccl")
Fastest = tuple[dict[str, Any], str]  # a case, and its mode: eager or graph
HEAD = "<!-- written by `swiftfusion bench report`; edits are lost -->"


@dataclass(frozen=True)
class Bar:
    """One measured time: median and quartiles, in the unit of its chart."""

    group: str
    label: str
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Section:
    """What one file says."""

    name: str
    title: str
    text: str
    heading: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    unit: str
    bars: tuple[Bar, ...]
    line: float | None = None  # where nothing is left to gain
    timelines: tuple[tuple[str, Path], ...] = ()  # what each shows, and the picture

    def markdown(self, folder: str) -> str:
        """The section of a page that lies beside the folder with the pictures."""
        aligned = [":--" if i < TEXT_COLUMNS else "--:" for i in range(len(self.heading))]
        table = "\n".join(
            f"| {' | '.join(cells)} |" for cells in (self.heading, tuple(aligned), *self.rows)
        )
        shown = [(self.title, f"{self.name}.png")]
        shown += [(what, path.name) for what, path in self.timelines]
        chart, *timelines = (f"![{what}]({folder}/{name})" for what, name in shown)
        parts = (f"## {self.title}", chart, table, *timelines, self.text)
        return "\n\n".join(parts) + "\n"


def read(directory: Path) -> list[Section]:
    """A section for each file of results that can be drawn, by file name.

    Raises:
        ValueError: the directory holds none.
    """
    sections = []
    for path in sorted(directory.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        kind = report.get("benchmark") if isinstance(report, dict) else None
        make = _SECTIONS.get(str(kind))
        if make is not None and report["settings"]["device"] == "cuda":
            section = make(path.stem, report)
            sections.append(replace(section, timelines=_timelines(report, directory)))
    if not sections:
        raise ValueError(f"RESULTS must hold files of bench layer or model_step, got {directory}")
    return sections


def page(sections: Iterable[Section], folder: str) -> str:
    """The whole page; pictures lie in ``folder``, seen from the page."""
    parts = [section.markdown(folder) for section in sections]
    return f"{HEAD}\n\n# Performance\n\n" + "\n".join(parts)


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
            fastest = _fastest(found["cases"], wanted)
            if fastest is None:
                continue
            case, mode = fastest
            ratio, times = case[f"{mode}_of_floor"], case[mode]
            what = case["name"] if case["kind"] in ("usp", "tas") else _schedule_of(case)
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
            bars.append(_bar_over_floor(shape, label, case, mode))
    title = f"One attention layer on {_gpus(report)}"
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
        text=f"The floor is {_lower(report['method']['floor'])} Exposed: what a layer takes beyond "
        f"the floor. {_origin(name, report)}",
        heading=heading,
        rows=tuple(row[: len(heading)] for row in rows),
        unit="time over the local kernel alone",
        bars=tuple(bars),
        line=1.0,
    )


def _fastest(
    cases: Iterable[dict[str, Any]], wanted: Callable[[dict[str, Any], str], bool]
) -> Fastest | None:
    """Of the cases that ran and are wanted, in either mode."""
    fits = [
        (case, mode)
        for case in cases
        for mode in ("eager", "graph")
        if case[mode] and not case["failure"] and wanted(case, mode)
    ]
    return min(fits, key=lambda fit: fit[0][fit[1]]["median"], default=None)


def _bar_over_floor(shape: str, label: str, case: dict[str, Any], mode: str) -> Bar:
    times, ratio = case[mode], case[f"{mode}_of_floor"]
    quartiles = (times[key] * ratio / times["median"] for key in ("q1", "median", "q3"))
    return Bar(shape, label, *quartiles)


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
    links that they really had, which the planner was not to know of.
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
        degrees, schedule = _planned(case)
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


def _schedule_of(case: dict[str, Any]) -> str:
    mesh, schedule = _planned(case)
    degrees = [degree for degree in mesh.split(",") if not degree.endswith("=1")]
    return f"{schedule} on {' '.join(degrees)}, {case['backend']}"


def _planned(case: dict[str, Any]) -> tuple[str, str]:
    """The mesh and the schedule that a case of ours ran on."""
    found = re.search(r"mesh (\S+), schedule (\w+)", case["plan"])
    assert found is not None, case["plan"]
    return found[1], found[2]


def step_section(name: str, report: dict[str, Any]) -> Section:
    """`model_step`: milliseconds of a denoising step of each size."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for found in report["sizes"]:
        for label, wanted in _STEP_CASES.items():
            fits = [r for r in found["results"] if r["ms"] and wanted(r)]
            if not fits:
                continue
            best = min(fits, key=lambda result: result["ms"]["median"])
            times, over = best["ms"], best.get("best_stock_over")
            size = f"{found['size']}{', compiled' if best['compiled'] else ''}"
            gain = "" if over is None else f"{over['median']:.2f}"
            memory = f"{best['peak_gib']:.2f}"
            rows.append((size, label, best["name"], f"{times['median']:.1f}", gain, memory))
            bars.append(Bar(size, label, *(times[key] for key in ("q1", "median", "q3"))))
    return Section(
        name=name,
        title=f"One step of {report['model'].get('title', 'FLUX.1-dev')} on {_gpus(report)}",
        text=f"Speedup: {_lower(report['method']['best stock /'])} {_origin(name, report)}",
        heading=("size", "way", "which", "ms", "speedup", "peak GiB"),
        rows=tuple(rows),
        unit="ms a step",
        bars=tuple(bars),
    )


def _is_step(kind: str, compiled: bool, result: dict[str, Any]) -> bool:
    return (result["kind"], result["compiled"]) == (kind, compiled)


_STEP_CASES: dict[str, Callable[[dict[str, Any]], bool]] = {
    f"{label}{', compiled' if compiled else ''}": partial(_is_step, kind, compiled)
    for compiled in (False, True)
    for kind, label in (
        ("stock", "xDiT's best"),
        ("ours", "torus"),
        ("ceiling", "without communication"),
    )
}


def trace_section(name: str, report: dict[str, Any]) -> Section:
    """`layer_trace`: how much of a layer passes without attention."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for found in report["shapes"]:
        shape = found["shape"]["name"]
        for case in (case for case in found["cases"] if not case["failure"]):
            label = _TRACE_LABELS[case["kind"]].format(**case)
            which = _schedule_of(case) if case["plan"] else case["name"]
            us = [case[f"{key}_us"]["median"] for key in ("layer", "attention", "exposed")]
            us += [case["exposed_percent"], case["over_alone_us"]]
            cells = ("" if number is None else f"{number:.1f}" for number in us)
            rows.append((shape, label, which, *cells))
            if case["kind"] != "floor":
                quartiles = (case["exposed_us"][key] for key in ("q1", "median", "q3"))
                bars.append(Bar(shape, label, *quartiles))
    exposed, over = (_lower(report["method"][key]) for key in ("exposed", "over alone"))
    heading = ("shape", "way", "which", "layer us", "attention us", "exposed us", "exposed %")
    return Section(
        name=name,
        title=f"Where the time goes: one layer on {_gpus(report)}",
        text=f"Exposed: {exposed} Over alone: {over} {_origin(name, report)}",
        heading=(*heading, "over alone us"),
        rows=tuple(rows),
        unit="us of a layer without attention",
        bars=tuple(bars),
    )


def peer_section(name: str, report: dict[str, Any]) -> Section:
    """`peer_layer`: each project's fastest mode beside ours."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for found in report["shapes"]:
        shape = found["shape"]["name"]
        ours = None
        for label in ("torus", "xDiT", *report["peers"]):
            fastest = _fastest(found["cases"], partial(_is_of, label))
            if fastest is None:
                continue
            case, mode = fastest
            ms, ratio = case[mode]["median"], case[f"{mode}_of_floor"]
            if label == "torus":
                ours = ms
            what = _schedule_of(case) if case["plan"] else case["name"].removeprefix(f"{label} ")
            cells = (f"{ms:.3f}", f"{ratio:.2f}", "" if ours is None else f"{ms / ours:.2f}")
            rows.append((shape, label, f"{what}, {mode}", *cells))
            bars.append(_bar_over_floor(shape, label, case, mode))
    peers = report["peers"].items()
    versions = [f"{each} {peer['version']}" for each, peer in peers if peer["version"]]
    reasons = {each: peer["not_run"] for each, peer in peers if peer["not_run"]}
    missing = [f"{each} ({why})" for each, why in {**reasons, **report["not_run"]}.items()]
    return Section(
        name=name,
        title=f"Other projects: one attention layer on {_gpus(report)}",
        text=f"Of each project the fastest of the modes that are exact; `{name}.json` has all. The "
        f"floor is {_lower(report['method']['floor'])} {'; '.join(versions)}. Not run: "
        f"{'; '.join(missing)}. {_origin(name, report)}",
        heading=("shape", "project", "which", "ms", "/ floor", "/ torus"),
        rows=tuple(rows),
        unit="time over the local kernel alone",
        bars=tuple(bars),
        line=1.0,
    )


def _is_of(project: str, case: dict[str, Any], mode: str) -> bool:
    kind = {"torus": "torus", "xDiT": "usp"}.get(project, "peer")
    return case["kind"] == kind and (kind != "peer" or case["name"].startswith(f"{project} "))


_TRACE_LABELS = {
    "floor": "kernel alone, {mode}",
    "usp": "xDiT's best, {mode}",
    "torus": "torus/{schedule}, {mode}",
}
_SECTIONS = {
    "layer": layer_section,
    "model_step": step_section,
    "layer_trace": trace_section,
    "peer_layer": peer_section,
}


def _timelines(report: dict[str, Any], directory: Path) -> tuple[tuple[str, Path], ...]:
    """The pictures that the benchmark left beside its file, those that are still there."""
    shown = {
        f"{found['shape']['name']}, {case['name']}, {case['mode']}": directory / case["picture"]
        for found in report.get("shapes", ())
        for case in found["cases"]
        if case.get("picture")
    }
    return tuple((what, path) for what, path in shown.items() if path.exists())


def _gpus(report: dict[str, Any]) -> str:
    names = [gpu["name"] for gpu in report["hardware"]["gpus"]]
    links = ", ".join(report["hardware"].get("gpu_links", ()))
    return f"{len(names)} x {names[0]}" + (f" ({links})" if links else "")


def _origin(name: str, report: dict[str, Any]) -> str:
    versions = report["versions"]
    known = ", ".join(f"{each} {versions[each]}" for each in VERSIONS if each in versions)
    return f"`{name}.json` of {report['date'][:10]}; {known}. Made with\n\n    {report['command']}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] + ("" if text.endswith(".") else ".")


def draw(section: Section, path: Path) -> None:
    """Write a section's bars as a PNG, whiskers from quartile to quartile.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing results needs matplotlib: pip install 'swiftfusion-xdit[plots]'"
        ) from error
    groups = list(dict.fromkeys(bar.group for bar in section.bars))
    labels = list(dict.fromkeys(bar.label for bar in section.bars))
    figure = Figure(figsize=(max(6.5, 1.6 * len(groups)), 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        bars = [bar for bar in section.bars if bar.label == label]
        places = [groups.index(bar.group) + (number + 0.5) * width - 0.4 for bar in bars]
        medians = [bar.median for bar in bars]
        below = [bar.median - bar.low for bar in bars]
        above = [bar.high - bar.median for bar in bars]
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(places, medians, width, yerr=(below, above), color=colour, label=label, capsize=2)
        for place, bar in zip(places, bars, strict=True):
            text = f"{bar.median:.2f}" if section.line else f"{bar.median:.0f}"
            axes.annotate(
                text, (place, bar.high), (0, 2), textcoords="offset points", ha="center", size=6
            )
    if section.line is not None:
        axes.axhline(section.line, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(section.unit)
    axes.set_title(section.title, size=9)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def write(results: Path, output: Path) -> list[Path]:
    """Write the page ``output`` with .md behind it, and its pictures into ``output``.

    Raises:
        ValueError, ImportError: see ``read`` and ``draw``.
    """
    sections = read(results)
    pictures = []
    for section in sections:
        pictures.append(output / f"{section.name}.png")
        draw(section, pictures[-1])
        for _, timeline in section.timelines:
            pictures.append(output / timeline.name)
            if timeline.resolve() != pictures[-1].resolve():
                shutil.copyfile(timeline, pictures[-1])
    written = output.with_name(f"{output.name}.md")
    written.write_text(page(sections, output.name), encoding="utf-8")
    return [written, *pictures]
