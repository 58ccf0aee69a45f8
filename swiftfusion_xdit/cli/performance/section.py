"""What one part of the page says: its table, its bars, its origin."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_COLUMNS = 3  # of every table; numbers follow
VERSIONS = ("torch", "cuda", "xfuser", "flash-attn-4", "nccl")
Fastest = tuple[dict[str, Any], str]  # a case, and its mode: eager or graph


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
    """What one part of the page says, of one file or of several."""

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


def fastest_of(
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


def bar_over_floor(shape: str, label: str, case: dict[str, Any], mode: str) -> Bar:
    times, ratio = case[mode], case[f"{mode}_of_floor"]
    quartiles = (times[key] * ratio / times["median"] for key in ("q1", "median", "q3"))
    return Bar(shape, label, *quartiles)


def schedule_of(case: dict[str, Any]) -> str:
    mesh, schedule = planned(case)
    degrees = [degree for degree in mesh.split(",") if not degree.endswith("=1")]
    groups = re.search(r"in (\d+) head groups", case["plan"])
    number = groups[1] if groups else case.get("groups")
    in_groups = f" in {number} groups" if number else ""
    return f"{schedule}{in_groups} on {' '.join(degrees)}, {case['backend']}"


def planned(case: dict[str, Any]) -> tuple[str, str]:
    """The mesh and the schedule that a case of ours ran on."""
    found = re.search(r"mesh (\S+), schedule (\w+)", case["plan"])
    assert found is not None, case["plan"]
    return found[1], found[2]


def gpus(report: dict[str, Any]) -> str:
    names = [gpu["name"] for gpu in report["hardware"]["gpus"]]
    links = ", ".join(report["hardware"].get("gpu_links", ()))
    return f"{len(names)} x {names[0]}" + (f" ({links})" if links else "")


def origin(name: str, report: dict[str, Any]) -> str:
    versions = report["versions"]
    known = ", ".join(f"{each} {versions[each]}" for each in VERSIONS if each in versions)
    return f"`{name}.json` of {report['date'][:10]}; {known}. Made with\n\n    {report['command']}"


def lower(text: str) -> str:
    return text[:1].lower() + text[1:] + ("" if text.endswith(".") else ".")
