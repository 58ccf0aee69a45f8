"""Whole images by xDiT's own runner, of `image.py`."""

from __future__ import annotations

from typing import Any

from swiftfusion_xdit.cli.performance.section import Bar, Section, gpus, lower, origin


def image_section(name: str, report: dict[str, Any]) -> Section:
    """`image`: seconds from the text to the picture, of each way that ran."""
    settings = report["settings"]
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for found in report["results"]:
        if found["failure"] or found["image_s"] is None:
            continue
        seconds, number = found["image_s"], sum(map(len, found["samples_s"]))
        way = f"xDiT {found['name']}" if found["strategy"] == "usp" else found["name"]
        over = "" if found["usp_over"] is None else f"{found['usp_over']:.2f}"
        cells = (f"{seconds['median']:.2f}", over, f"{found['load_s']:.0f}", str(number))
        rows.append((str(settings["size"]), way, found["plan"] or "", *cells))
        bars.append(Bar(way, "image", *(seconds[key] * 1e3 for key in ("q1", "median", "q3"))))
    cut = "" if report["complete"] else "The run ended before its last launch. "
    return Section(
        name=name,
        title=f"A whole image of FLUX.1 in {settings['steps']} steps on {gpus(report)}",
        text=f"An image: {lower(report['method']['s / image'])} Weights and text encoders: "
        f"{lower(report['weights'])} {cut}{origin(name, report)}",
        heading=("size", "way", "plan", "s / image", "best usp / it", "loading s", "images"),
        rows=tuple(rows),
        unit="ms of an image",
        bars=tuple(bars),
    )
