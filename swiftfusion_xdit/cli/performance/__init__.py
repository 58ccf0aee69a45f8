"""`swiftfusion bench report`: pages and pictures from the files that benchmarks left.

Reads what `bench layer --json` and `model_step.py`, `image.py`, `layer_trace.py` and
`peer_layer.py` of `benchmarks/` wrote. What all models gain comes first; then each file becomes a
section with its hardware, versions and command, a table and a bar chart, and the timelines that lie
beside it. What is slower is in it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from swiftfusion_xdit.cli.performance.draw import draw
from swiftfusion_xdit.cli.performance.images import image_section
from swiftfusion_xdit.cli.performance.layers import layer_section
from swiftfusion_xdit.cli.performance.peers import peer_section
from swiftfusion_xdit.cli.performance.section import Section
from swiftfusion_xdit.cli.performance.steps import models_section, scaling_section, step_section
from swiftfusion_xdit.cli.performance.traces import timelines, trace_section

HEAD = "<!-- written by `swiftfusion bench report`; edits are lost -->"
SECTIONS: dict[str, Callable[[str, dict[str, Any]], Section]] = {
    "layer": layer_section,
    "model_step": step_section,
    "image": image_section,
    "layer_trace": trace_section,
    "peer_layer": peer_section,
}


def read(directory: Path) -> list[Section]:
    """What the files of GPUs say: of all steps of models together, then of each file by its name.

    Raises:
        ValueError: the directory holds no file that can be drawn.
    """
    reports: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        is_known = isinstance(report, dict) and report.get("benchmark") in SECTIONS
        if is_known and report["settings"]["device"] == "cuda":
            reports[path.stem] = report
    if not reports:
        raise ValueError(f"RESULTS must hold files of bench layer or model_step, got {directory}")
    steps = {name: each for name, each in reports.items() if each["benchmark"] == "model_step"}
    together = [section for make in (models_section, scaling_section) if (section := make(steps))]
    files = [
        replace(SECTIONS[report["benchmark"]](name, report), timelines=timelines(report, directory))
        for name, report in reports.items()
    ]
    return [*together, *files]


def page(sections: Iterable[Section], folder: str) -> str:
    """The whole page; pictures lie in ``folder``, seen from the page."""
    parts = [section.markdown(folder) for section in sections]
    return f"{HEAD}\n\n# Performance\n\n" + "\n".join(parts)


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
