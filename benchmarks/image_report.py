"""What image.py's launches say: rows of results, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.common import quartiles
from benchmarks.image_config import Case, Settings
from benchmarks.image_launch import Launched
from swiftfusion_xdit.cli.bench_report import tables_console

# Of 57 layers, 28 steps and the real VAE, two heads wide, on a CPU: rounding made 0.018; wrong in
# all layers, keys without their last tenth 0.045, two halves merged without their weights 0.09, one
# head of two with mixed-up keys 0.19, all keys mixed up 0.28; these in one layer of 57 alone 0.028.
MAX_DIFFERENCE = 0.06
# Of a picture's levels, 0 to 255: below it a picture is one colour, and would agree with any such.
MIN_CONTRAST = 4.0
HEADINGS = ("strategy", "s / image (quartiles)", "usp /", "load s", "difference", "note")

METHOD = {
    "launches": "Each is a whole xDiT: python -m swiftfusion_xdit xdit, which starts xfuser.runner "
    "on every rank with the plugin loaded. Rows take turns, a launch each in every round, and the "
    "first one rotates. A row whose launch failed is not launched again.",
    "s / image": "What xDiT's runner reports (timings.json): from a barrier of all ranks to the "
    "last rank's picture, so text encoding, all denoising steps and the VAE; no start, no loading, "
    "no saving. The first image of each launch is the warm-up, which xDiT leaves out itself.",
    "usp /": "The fastest row of usp over this one, both medians over all launches.",
    "plan": "Mesh and schedule that torus logs when it first attends. A row of torus whose log "
    "says nothing of torus has failed, as has a row of another strategy whose log does.",
    "load s": "From the launch to loaded weights: processes, imports, loading. Seen in xDiT's log, "
    "which is read every 0.2 s. Median.",
    "compile s": "xDiT's torch.compile and its warm-up of 2 steps, after loading. Median.",
    "difference": "Norm of the difference of the saved pictures (8 bits a channel) to the first "
    "launch of the first row of usp (of any, without usp), over the norm of that picture less its "
    "mean; the largest of all launches. Above settings.max_difference the row has failed. On a "
    "CPU, with 57 layers of two heads and 28 steps, rounding made 0.018, mixed-up keys 0.28, and "
    "in one layer alone 0.028, which passes.",
    "weights": "Unless a checkpoint was there: random, bfloat16, seeded. The transformer and the "
    "VAE have FLUX.1-dev's sizes (with --tiny: a few small layers). Text encoders are stand-ins of "
    "one small layer, whose outputs have the widths that the transformer takes (T5 4096, CLIP "
    "768): a real T5 adds the same time to every row.",
}


def results_of(
    launches: Mapping[Case, Sequence[Launched]], max_difference: float
) -> list[dict[str, Any]]:
    """A row for each case, with what its launches gave so far."""
    pictures = {case: pictures_of(done) for case, done in launches.items()}
    of_usp_first = sorted(pictures, key=lambda case: case.strategy != "usp")
    reference = next((pictures[case][0] for case in of_usp_first if pictures[case]), None)
    rows = []
    for case, done in launches.items():
        differences = [difference(shown, reference) for shown in pictures[case]]
        samples = [launched.images_s for launched in done if launched.failure is None]
        row: dict[str, Any] = {
            "name": case.name,
            "strategy": case.strategy,
            "backend": case.backend,
            "ulysses": case.ulysses,
            "ring": case.ring,
            "schedule": case.schedule if case.strategy == "torus" else None,
            "image_s": summed_up([s for launched in samples for s in launched]),
            "samples_s": samples,
            "load_s": median([launched.load_s for launched in done]),
            "loads_s": [launched.load_s for launched in done],
            "compile_s": median([launched.compile_s for launched in done]),
            "launches_s": [launched.wall_s for launched in done],
            "difference": max(differences, default=None),
            "is_reference": bool(pictures[case]) and pictures[case][0] is reference,
            "plan": next((launched.plan for launched in done if launched.plan), None),
            "failure": failure_of(done, differences, pictures[case], max_difference),
            "log": next((launched.log for launched in done if launched.failure), []),
        }
        rows.append(row)
    _add_gains(rows)
    return rows


def pictures_of(launches: Sequence[Launched]) -> list[np.ndarray]:
    """Those of launches that were as they should be."""
    good = [launched for launched in launches if launched.failure is None]
    return [launched.picture for launched in good if launched.picture is not None]


def difference(picture: np.ndarray, reference: np.ndarray | None) -> float:
    """Norm of the difference over the norm of the reference's contrast."""
    assert reference is not None
    if picture.shape != reference.shape:
        return float("inf")
    exact = reference.astype(np.float64)
    scale = float(np.linalg.norm(exact - exact.mean()))
    return float(np.linalg.norm(picture - exact)) / max(scale, 1e-300)


def failure_of(
    launches: Sequence[Launched],
    differences: Sequence[float],
    pictures: Sequence[np.ndarray],
    max_difference: float,
) -> str | None:
    """Why a row's times do not count: a launch failed, or its picture is not the one wanted."""
    for launched in launches:
        if launched.failure is not None:
            return launched.failure
    if any(picture.std() < MIN_CONTRAST for picture in pictures):
        return f"a picture of one colour: its levels' deviation is below {MIN_CONTRAST:g}"
    if differences and not max(differences) <= max_difference:
        return f"another picture: {max(differences):.3g} is above {max_difference:g}"
    return None


def summed_up(samples: Sequence[float]) -> dict[str, float] | None:
    if not samples:
        return None
    return dict(zip(("q1", "median", "q3"), quartiles(samples), strict=True))


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 2) if known else None


def _add_gains(rows: Sequence[dict[str, Any]]) -> None:
    """`usp_over`: the fastest usp's median over this row's. Rows that failed take no part."""
    good = [row for row in rows if row["failure"] is None and row["image_s"] is not None]
    stock = [row for row in good if row["strategy"] == "usp"]
    best = min(stock, key=lambda row: row["image_s"]["median"], default=None)
    for row in good if best is not None else ():
        row["usp_over"] = best["image_s"]["median"] / row["image_s"]["median"]
        row["is_best_usp"] = row is best


def show(report: Mapping[str, Any], settings: Settings) -> None:
    model = "a tiny FLUX.1" if settings.tiny else "FLUX.1-dev"
    mode = "torch.compile" if settings.compile else "eager"
    table = Table(
        title=f"An image of {model} at {settings.size}, {settings.steps} steps, {mode}: "
        f"{settings.ranks} ranks, {settings.images} images a launch"
    )
    for heading in HEADINGS:
        is_text = heading in ("strategy", "note")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=heading != "note")
    for row in report["results"]:
        table.add_row(*_cells(row))
    tables_console().print(table)
    print(*(f"{name}: {text}" for name, text in METHOD.items()), sep="\n")


def _cells(row: Mapping[str, Any]) -> list[str]:
    far = "" if row["difference"] is None else f"{row['difference']:.1e}"
    load = "" if row["load_s"] is None else f"{row['load_s']:.1f}"
    if row["failure"] is not None:
        note = "\n".join([f"FAILED: {row['failure']}", *row["log"][-3:]])
        return [row["name"], "", "", load, far, note]
    if row["image_s"] is None:
        return [row["name"], "", "", load, far, "not launched"]
    low, middle, high = (f"{row['image_s'][q]:.2f}" for q in ("q1", "median", "q3"))
    notes = [
        row["plan"] or "",
        "others are compared with it" if row["is_reference"] else "",
        "the best usp" if row.get("is_best_usp") else "",
        f"compiled in {row['compile_s']:.0f} s" if row["compile_s"] is not None else "",
    ]
    gain = f"{row['usp_over']:.3f}" if "usp_over" in row else ""
    note = "; ".join(part for part in notes if part)
    return [row["name"], f"{middle} ({low} - {high})", gain, load, far, note]
