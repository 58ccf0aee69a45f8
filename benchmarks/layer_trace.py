"""Where does the time of one attention layer go, under xDiT's own USP and under torus?

    python -m benchmarks.layer_trace --output DIR [--shapes flux1024,wan480] [--backend fa4]
        [--schedules auto,torus] [--ranks N] [--graph] [--ahead]

Warm layers run back to back under a profiler, which records every kernel and copy of every rank.
DIR gets `layer_trace.json` with the time in which no attention kernel was at work, and of each case
one layer as a picture and for Perfetto. Of xDiT's it is Ulysses over all ranks. `--graph` records
torus in a CUDA graph too; otherwise small layers are CUDA graphs of their own, as by default (none
with SWIFTFUSION_LAYER_GRAPHS=0). `--ahead` records all once more with the GPUs held until their
hosts have enqueued the layers, so that what a host takes to launch kernels is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import provenance
from benchmarks.layer_trace_ranks import MARKERS, WARM_LAYERS, TraceConfig
from benchmarks.trace_events import (
    LANES,
    LayerRun,
    NotSplit,
    Recording,
    align,
    classify,
    layer_times,
    split_layers,
    to_events,
)
from swiftfusion_xdit.cli import bench
from swiftfusion_xdit.cli.bench_config import SHAPES
from swiftfusion_xdit.cli.bench_launch import run_ranks
from swiftfusion_xdit.cli.bench_report import spread, tables_console, write_json
from swiftfusion_xdit.simulate import timeline

NAME = "layer_trace"
METHOD = {
    "recording": f"{WARM_LAYERS} layers that are left out, then `layers` layers, back to back "
    f"between all-reduces, twice under torch.profiler with CUDA activities alone; the second time "
    "counts. On CPU ranks torch.profiler's operators, and the runtime's own events for torus.",
    "layer": "From the end of the layer before to the last end of any of the layer's kernels and "
    "copies; where layers differ in these, from its first attention kernel to the next layer's.",
    "exposed": "Layer time minus the time in which an attention kernel was at work on that rank: "
    "of each rank the median over layers, then the rank with the most. What an attention kernel "
    "itself waits for, as `fused` does, is part of its time: see `over alone`.",
    "over alone": "Layer time minus that of the attention kernel alone, on heads / ranks heads and "
    "all rows, on all ranks at once, recorded the same way: what communication costs, wherever it "
    "is waited for.",
    "idle": "The part of `exposed` in which no kernel and no copy of the rank was at work.",
    "untraced": "The same layers without the profiler, on the slowest rank; by CUDA events on GPUs."
    " A case whose layers take longer than that was disturbed.",
    "clocks": "Kineto gives CUPTI's times as Unix time. Ranks are moved onto rank 0's clock by the "
    f"median difference of the ends of {MARKERS} all-reduces in front of the layers, by "
    "`shift_us`; those behind the layers then end `residual_us` apart.",
    "lanes": "Kernels by name: attention; NCCL, NVSHMEM and copies between GPUs are transfers, "
    "with torus also those that CUDA takes for copies inside a GPU. Small pushes that torus makes "
    "by a kernel, and all else, are other kernels.",
}


def make_config(arguments: list[str]) -> tuple[TraceConfig, Path]:
    """The checked arguments, and the folder for results.

    Raises:
        ValueError: an argument that is wrong, or that this machine cannot serve.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs if any")
    add("--shapes", help=f"of {','.join(SHAPES)} or custom B,S,H,D (all; on CPU {bench.CPU_SHAPE})")
    add("--backend", dest="backends", help="the local kernel of both sides (fa4; on CPU cpu)")
    add("--schedules", default="auto", help="of torus (auto)")
    add("--ranks", type=int, help=f"ranks (all GPUs; on CPU {bench.CPU_RANKS})")
    add("--dtype", help="bfloat16, float16, float32 (bfloat16; on CPU float32)")
    add("--layers", type=int, default=8, help="layers that count, an even number (8)")
    add("--graph", action="store_true", help="also torus in a CUDA graph")
    add("--ahead", action="store_true", help="also with hosts that are ahead of their GPUs")
    add("--timeout", type=float, default=600.0, help="seconds for the whole run (600)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for JSON and pictures")
    args = parser.parse_args(arguments)
    fixed = {"strategies": "usp,torus"}
    given = argparse.Namespace(**{**bench.layer_defaults(), **vars(args), **fixed})
    if given.backends is None and bench.make_config(given).device == "cuda":
        given.backends = "fa4"
    base = bench.make_config(given)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return TraceConfig(**fields, layers=args.layers, ahead=args.ahead), args.output


def summarise(
    result: dict[str, Any], num_layers: int
) -> tuple[dict[str, Any], list[list[LayerRun]]]:
    """The numbers of one case, and the layers of each rank, on one clock, without warm ones."""
    result = dict(result)
    recordings: list[Recording] = result.pop("recordings", None) or []
    if result["failure"] is not None:
        return result, []
    aligned, shifts_us, residual_us = align(recordings)
    try:
        found = [split_layers(each, num_layers) for each in aligned]
    except NotSplit as error:
        return result | {"failure": str(error)}, []
    layers = [runs[WARM_LAYERS:] for runs, _ in found]
    pushes = recordings[0].pushes
    ranks = [_spreads([layer_times(run, pushes=pushes) for run in runs]) for runs in layers]
    worst = max(range(len(ranks)), key=lambda rank: ranks[rank]["exposed_us"]["median"])
    summary = {
        **ranks[worst],
        "exposed_percent": _percent(ranks[worst]),
        "worst_rank": worst,
        "split_by": sorted({how for _, how in found}),
        "clocks": {
            "shift_us": [round(by, 3) for by in shifts_us],
            "residual_us": round(residual_us, 3),
        },
        "names": _names(layers[worst], pushes),
        "ranks": ranks,
    }
    return result | summary, layers


def _percent(times: dict[str, dict[str, float]]) -> float:
    layer_us = times["layer_us"]["median"]
    return round(100 * times["exposed_us"]["median"] / layer_us, 1) if layer_us else 0.0


def _spreads(layers: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        key: {name: round(us, 2) for name, us in spread([times[key] for times in layers]).items()}
        for key in layers[0]
    }


def _names(layers: Sequence[LayerRun], pushes: bool) -> dict[str, dict[str, list[float]]]:
    """What was in each lane: how often a layer, and microseconds of a layer."""
    found: dict[str, dict[str, list[float]]] = {lane: {} for lane in LANES}
    for each in (each for run in layers for each in run.activities):
        lane, label = classify(each, pushes=pushes)
        sums = found[lane].setdefault(label, [0.0, 0.0])
        sums[0] += 1 / len(layers)
        sums[1] += (each.end_us - each.start_us) / len(layers)
    return {
        lane: {label: [round(number, 2) for number in sums] for label, sums in names.items()}
        for lane, names in found.items()
    }


def add_over_alone(cases: list[dict[str, Any]]) -> None:
    """Compare each layer with the attention kernel alone; None if that failed."""
    recorded = [case for case in cases if case["failure"] is None]
    alone = [case["attention_us"]["median"] for case in recorded if case["kind"] == "floor"]
    for case in recorded:
        layer_us = case["layer_us"]["median"]
        case["over_alone_us"] = round(layer_us - min(alone), 2) if alone else None


def middle_layer(layers: Sequence[Sequence[LayerRun]]) -> list[LayerRun]:
    """The layer of each rank, the same one, whose time on the slowest rank is the median one."""
    slowest = [
        (max(run.end_us - run.start_us for run in runs), idx)
        for idx, runs in enumerate(zip(*layers, strict=False))
    ]
    _, idx = sorted(slowest)[(len(slowest) - 1) // 2]
    return [runs[idx] for runs in layers]


def draw(
    case: dict[str, Any],
    layers: Sequence[Sequence[LayerRun]],
    output: Path,
    *,
    shape: str,
    where: str,
) -> dict[str, str]:
    """Write one layer as a picture and for Perfetto; their names."""
    pushes = case["kind"] == "torus"
    events = [
        event
        for rank, run in enumerate(middle_layer(layers))
        for event in to_events(rank, run.activities, pushes=pushes)
    ]
    slug = re.sub(r"[^a-z0-9]+", "_", f"{shape} {case['name']} {case['mode']}".lower())
    stem = f"{NAME}_{slug.strip('_')}"
    timeline.write_chrome_trace(events, output / f"{stem}.perfetto.json")
    picture = output / f"{stem}.png"
    title = (
        f"{shape}, {where}: {case['name']}, {case['mode']}\n"
        f"{case['layer_us']['median']:.0f} us a layer, {case['exposed_us']['median']:.0f} us of it "
        "without attention"
    )
    timeline.draw(events, picture, title=title)
    return {"picture": picture.name, "timeline": f"{stem}.perfetto.json"}


def table_of(found: dict[str, Any]) -> Table:
    """One shape's cases."""
    table = Table(title=f"{found['shape']['name']}: microseconds of a layer, medians")
    table.add_column("case", overflow="fold")
    headings = ("layer", "untraced", "attention", "exposed", "%", "idle", "over alone")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("note", overflow="fold")
    for case in found["cases"]:
        name = f"{case['name']}, {case['mode']}"
        if case["failure"] is not None:
            table.add_row(name, *[""] * len(headings), case["failure"])
            continue
        us = {
            key: f"{case[f'{key}_us']['median']:.1f}"
            for key in ("layer", "attention", "exposed", "idle")
        }
        table.add_row(
            name,
            us["layer"],
            f"{case['untraced_us']:.1f}",
            us["attention"],
            us["exposed"],
            f"{case['exposed_percent']:.1f}",
            us["idle"],
            "" if case["over_alone_us"] is None else f"{case['over_alone_us']:.1f}",
            _note(case),
        )
    return table


def _note(case: dict[str, Any]) -> str:
    notes = [case["plan"].split("mesh ")[1].rsplit(",", 1)[0]] if case["plan"] else []
    if case["mode"] == "ahead" and not case["host_was_ahead"]:
        notes.append("a host was not ahead")
    if case["split_by"] != ["activities"]:
        notes.append("layers by their attention kernels")
    return "; ".join(notes)


def run(config: TraceConfig, output: Path, arguments: list[str]) -> dict[str, Any]:
    """Record, print the tables, write pictures and, after each shape, the JSON."""
    output.mkdir(parents=True, exist_ok=True)
    tables, start_s = tables_console(), time.monotonic()
    report: dict[str, Any] = {
        **provenance(NAME, __doc__, arguments),
        "settings": dataclasses.asdict(config),
        "method": METHOD,
        "shapes": [],
    }

    def take(kind: str, value: dict[str, Any]) -> None:
        if kind == "machine":
            report.update(value)
            return
        gpus = _gpu_name(report)
        where = f"{config.ranks} {f'x {gpus}' if gpus else 'CPU ranks'}"
        cases = []
        for result in value["cases"]:
            case, layers = summarise(result, WARM_LAYERS + config.layers)
            if layers and case["kind"] != "floor":
                case |= draw(case, layers, output, shape=value["shape"]["name"], where=where)
            cases.append(case)
        add_over_alone(cases)
        found = value | {"cases": cases}
        report["shapes"].append(found)
        report["seconds"] = round(time.monotonic() - start_s, 1)
        tables.print(table_of(found))
        write_json(output / f"{NAME}.json", report)

    run_ranks(config, take)
    return report


def _gpu_name(report: dict[str, Any]) -> str:
    """The name of the GPUs that ran, or nothing."""
    gpus = report["hardware"]["gpus"]
    return gpus[0]["name"] if gpus and report["settings"]["device"] == "cuda" else ""


def main(arguments: list[str]) -> int:
    """0: all cases were recorded; 1: one was not; 2: bad arguments."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        config, output = make_config(arguments)
    except ValueError as error:
        console.print(f"{NAME}: error: {error}", style="red")
        return 2
    report = bench.guarded(NAME, console, lambda: run(config, output, arguments))
    if isinstance(report, int):
        return report
    failed = [
        f"{found['shape']['name']}, {case['name']}, {case['mode']}: {case['failure']}"
        for found in report["shapes"]
        for case in found["cases"]
        if case["failure"] is not None
    ]
    for line in failed:
        console.print(f"failed: {line}", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
