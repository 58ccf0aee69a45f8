"""What the demo's launches left behind, read, compared and shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from swiftfusion_xdit.simulate.timeline import Event

TOLERANCE = 1e-4
COMPARED = (
    "latents that enter the VAE, float32, every rank that decodes, against one process; relative "
    "is the norm of the difference over the norm of the latents"
)


@dataclass(frozen=True)
class RankReport:
    """What one rank of a launch wrote when it exited (see xdit/report.py)."""

    rank: int
    strategy: str
    mesh: dict[str, int]
    attention_calls: int
    bytes_same_machine: int
    bytes_across_machines: int
    unmetered: tuple[str, ...]
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Outcome:
    """The results of one launch: `latents` of each rank that decoded, float32."""

    latents: dict[int, np.ndarray]
    picture: np.ndarray
    seconds: float
    ranks: tuple[RankReport, ...]


def read_rank_reports(directory: Path, num_ranks: int) -> tuple[RankReport, ...]:
    """The reports of all ranks of a launch.

    Raises:
        FileNotFoundError: a rank left no report; the message names the file.
    """
    reports = []
    for rank in range(num_ranks):
        path = directory / f"rank{rank}.json"
        if not path.exists():
            raise FileNotFoundError(f"rank {rank} of {num_ranks} wrote no report: {path}")
        fields = json.loads(path.read_text(encoding="utf-8"))
        events = tuple(Event(rank, *event) for event in fields["events"])
        reports.append(
            RankReport(
                rank=rank,
                strategy=fields["strategy"],
                mesh=fields["mesh"],
                attention_calls=fields["attention_calls"],
                bytes_same_machine=fields["bytes_same_machine"],
                bytes_across_machines=fields["bytes_across_machines"],
                unmetered=tuple(fields["unmetered"]),
                events=events,
            )
        )
    return tuple(reports)


def read_latents(directory: Path) -> dict[int, np.ndarray]:
    """The latents of each rank that decoded.

    Raises:
        FileNotFoundError: no rank did.
    """
    latents = {
        int(path.stem.removeprefix("latents_rank")): np.load(path, allow_pickle=False)
        for path in sorted(directory.glob("latents_rank*.npy"))
    }
    if not latents:
        raise FileNotFoundError(f"no rank recorded its latents: {directory}/latents_rank*.npy")
    return latents


def read_picture(directory: Path) -> np.ndarray:
    """The image that xDiT saved, or a video's frames side by side: uint8 `[height, width, 3]`."""
    found = [*sorted(directory.glob("*.png")), *sorted(directory.glob("*.mp4"))]
    if not found:
        raise FileNotFoundError(f"xDiT saved neither an image nor a video in {directory}")
    if found[0].suffix == ".png":
        return np.asarray(Image.open(found[0]).convert("RGB"))
    import av

    with av.open(str(found[0])) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    return np.concatenate(frames, axis=1)


def compare(outcome: Outcome, single: Outcome) -> dict[str, float]:
    """Largest absolute and relative difference of any rank's latents from the single process."""
    (reference,) = single.latents.values()
    exact = reference.astype(np.float64)
    scale = float(np.linalg.norm(exact))
    max_abs = relative = 0.0
    for latents in outcome.latents.values():
        if latents.shape != reference.shape:
            max_abs = relative = float("inf")
            break
        difference = latents.astype(np.float64) - exact
        max_abs = max(max_abs, _number(np.abs(difference).max()))
        relative = max(relative, _number(np.linalg.norm(difference)) / max(scale, 1e-300))
    levels = np.abs(outcome.picture.astype(int) - single.picture.astype(int)).max()
    return {
        "max_abs_diff_vs_single": max_abs,
        "relative_diff_vs_single": relative,
        "max_picture_level_diff_vs_single": int(levels),
    }


def _number(value: Any) -> float:
    """NaN must not pass for agreement: comparisons with it are false."""
    return float("inf") if np.isnan(value) else float(value)


def build_report(
    outcomes: Mapping[str, Outcome], *, settings: Mapping[str, Any], num_machines: int
) -> dict[str, Any]:
    """The report of a demo: `outcomes` by strategy, and `single`."""
    single = outcomes["single"]
    strategies: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        if name == "single":
            continue
        differences = compare(outcome, single)
        strategies[name] = {
            **differences,
            "agrees": differences["relative_diff_vs_single"] <= TOLERANCE,
            "seconds": outcome.seconds,
            "bytes_same_machine": sum(rank.bytes_same_machine for rank in outcome.ranks),
            "bytes_across_machines": sum(rank.bytes_across_machines for rank in outcome.ranks),
            "mesh": outcome.ranks[0].mesh,
            # Collectives that the meter does not know: with any, the bytes are too low.
            "unmetered": sorted({name for rank in outcome.ranks for name in rank.unmetered}),
        }
    torus = outcomes["torus"].ranks
    return {
        "ranks": len(torus),
        "machines": num_machines,
        "mesh": torus[0].mesh,
        "strategies": strategies,
        "single": {"seconds": single.seconds},
        "attention_calls": torus[0].attention_calls,
        "compared": COMPARED,
        "tolerance": TOLERANCE,
        **settings,
    }


def report_table(report: Mapping[str, Any]) -> Table:
    """`report` as a table."""
    mesh = ", ".join(f"{axis} {degree}" for axis, degree in report["mesh"].items())
    table = Table(
        title=f"{report['ranks']} ranks as {report['machines']} machines; torus runs {mesh}",
        caption="within, across: KiB sent inside a machine and across machines in the whole run",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("strategy")
    for header in ("max |diff|", "relative", "agrees", "seconds", "within", "across"):
        table.add_column(header, justify="right")
    for name, row in report["strategies"].items():
        table.add_row(
            name,
            f"{row['max_abs_diff_vs_single']:.1e}",
            f"{row['relative_diff_vs_single']:.1e}",
            "yes" if row["agrees"] else "[bold red]NO[/]",
            f"{row['seconds']:.2f}",
            f"{row['bytes_same_machine'] / 1024:,.0f}",
            f"{row['bytes_across_machines'] / 1024:,.0f}",
        )
    table.add_row("single", "", "", "", f"{report['single']['seconds']:.2f}", "", "")
    return table
