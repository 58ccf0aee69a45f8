"""Denoising steps of whole models, of `model_step.py`: each file, all of them, their scaling."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swiftfusion_xdit.cli.performance.section import Bar, Section, gpus, lower, origin

WAYS = {"stock": "xDiT's best", "ours": "torus", "ceiling": "without communication"}


@dataclass(frozen=True)
class Step:
    """A model's step at one size, eager or compiled, and the fastest result of each kind."""

    file: str
    report: dict[str, Any]
    size: str
    rounds: int
    compiled: bool
    fastest: dict[str, dict[str, Any]]  # by kind, of ``WAYS``

    @property
    def model(self) -> str:
        return str(self.report["model"]["title"])

    @property
    def ranks(self) -> int:
        return int(self.report["settings"]["ranks"])

    @property
    def gpu(self) -> str:
        return str(self.report["hardware"]["gpus"][0]["name"])

    @property
    def name(self) -> str:
        return f"{self.size}{', compiled' if self.compiled else ''}"

    def ms(self, kind: str) -> float:
        return float(self.fastest[kind]["ms"]["median"])


def steps_of(file: str, report: dict[str, Any]) -> Iterator[Step]:
    """In the order of the file; eager before compiled."""
    for found in report["sizes"]:
        for compiled in (False, True):
            fastest: dict[str, dict[str, Any]] = {}
            for kind in WAYS:
                fits = [
                    result
                    for result in found["results"]
                    if result["ms"] and (result["kind"], result["compiled"]) == (kind, compiled)
                ]
                if fits:
                    fastest[kind] = min(fits, key=lambda result: result["ms"]["median"])
            if fastest:
                yield Step(file, report, found["size"], found["rounds"], compiled, fastest)


def step_section(name: str, report: dict[str, Any]) -> Section:
    """Milliseconds of a denoising step of each size."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for step in steps_of(name, report):
        for kind, best in step.fastest.items():
            label = WAYS[kind] + (", compiled" if step.compiled else "")
            times, over = best["ms"], best.get("best_stock_over")
            gain = "" if over is None else f"{over['median']:.2f}"
            memory = f"{best['peak_gib']:.2f}"
            rows.append((step.name, label, best["name"], f"{times['median']:.1f}", gain, memory))
            bars.append(Bar(step.name, label, *(times[key] for key in ("q1", "median", "q3"))))
    return Section(
        name=name,
        title=f"One step of {report['model']['title']} on {gpus(report)}",
        text=f"Speedup: {lower(report['method']['best stock /'])} {origin(name, report)}",
        heading=("size", "way", "which", "ms", "speedup", "peak GiB"),
        rows=tuple(rows),
        unit="ms a step",
        bars=tuple(bars),
    )


def models_section(reports: Mapping[str, dict[str, Any]]) -> Section | None:
    """What every step of every file gains over xDiT's best, and what would be left to gain."""
    steps = [step for name, report in reports.items() for step in steps_of(name, report)]
    steps = [step for step in steps if {"stock", "ours"} <= step.fastest.keys()]
    if not steps:
        return None
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    gains: list[float] = []
    for step in steps:
        group = _group(step, bars)
        over = {kind: best["best_stock_over"] for kind, best in step.fastest.items()}
        gains.append(over["ours"]["median"])
        cells = [f"{step.ms('stock'):.1f}", f"{step.ms('ours'):.1f}", f"{gains[-1]:.2f}"]
        if "ceiling" in over:
            of_ceiling = 100 * over["ours"]["median"] / over["ceiling"]["median"]
            cells += [f"{over['ceiling']['median']:.2f}", f"{of_ceiling:.1f}"]
        else:
            cells += ["", ""]
        row = (step.model, step.name, f"{step.ranks} x {step.gpu}", *cells, str(step.rounds))
        rows.append(row)
        for kind in ("ours", "ceiling"):
            if kind in over:
                quartiles = (over[kind][key] for key in ("q1", "median", "q3"))
                bars.append(Bar(group, WAYS[kind], *quartiles))
    heading = ("model", "step", "GPUs", "xDiT's best ms", "torus ms", "speedup")
    heading_more = ("speedup without communication", "speedup, % of that", "rounds")
    return Section(
        name="models",
        title="Steps of whole models: what torus gains over xDiT's best",
        text=f"Mean speedup of the {len(gains)} rows: {statistics.mean(gains):.2f}. The sections "
        "below say which of xDiT's ways was the best, and how each was measured.",
        heading=(*heading, *heading_more),
        rows=tuple(rows),
        unit="speedup over xDiT's best",
        bars=tuple(bars),
        line=1.0,
    )


def _group(step: Step, bars: Sequence[Bar]) -> str:
    """What a step's bars are called; another run of the same step is told by its file."""
    group = f"{step.model}\n{step.name}\n{step.ranks} GPUs"
    return f"{group}\n{step.file}" if group in {bar.group for bar in bars} else group


def scaling_section(reports: Mapping[str, dict[str, Any]]) -> Section | None:
    """How much sooner a step is done than on one GPU, for the steps that have run on one."""
    steps = [step for name, report in reports.items() for step in steps_of(name, report)]
    alone: dict[tuple[str, str, str], float] = {}
    for step in (step for step in steps if step.ranks == 1):
        key = (step.model, step.name, step.gpu)
        alone[key] = min(step.ms("stock"), alone.get(key, math.inf))
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for step in sorted(steps, key=lambda step: (step.model, step.name, step.ranks)):
        one_ms = alone.get((step.model, step.name, step.gpu))
        if one_ms is None:
            continue
        group = _group(step, bars)
        for kind, best in step.fastest.items():
            ms = step.ms(kind)
            share = 100 * one_ms / ms / step.ranks
            cells = (f"{ms:.1f}", f"{one_ms / ms:.2f}", f"{share:.0f}")
            label = "xDiT" if step.ranks == 1 else WAYS[kind]
            place = f"{step.ranks} x {step.gpu}"
            rows.append((f"{step.model} {step.name}", place, label, *cells))
            if step.ranks > 1:
                times = (best["ms"][key] for key in ("q3", "median", "q1"))
                bars.append(Bar(group, label, *(one_ms / ms for ms in times)))
    if not bars:
        return None
    return Section(
        name="scaling",
        title="Steps of whole models on several GPUs over one",
        text="The medians of different runs, divided; the sections below say how each was "
        "measured. Efficiency: of as many times one GPU's speed as there are GPUs.",
        heading=("step", "GPUs", "way", "ms", "over one GPU", "efficiency %"),
        rows=tuple(rows),
        unit="times the speed of one GPU",
        bars=tuple(bars),
        line=1.0,
    )
