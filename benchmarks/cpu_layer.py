"""Does an attention layer over shared memory take no longer than xDiT's USP over gloo?

    python -m benchmarks.cpu_layer [--json benchmarks/results/cpu_layer.json]

All in one run, in turn: xDiT's unmodified USP at each of its degrees, our `torus` and `pipelined`
schedules, and the attention kernel alone as the floor. One kernel (aten's flash attention for CPU),
one thread a rank, the same inputs; every output is checked against attention in fp64 first.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import environment, provenance, quartiles
from benchmarks.cpu_layer_ranks import MAX_ERROR, Case, Settings, measure
from benchmarks.overhead import SMALL_ROWS
from swiftfusion_xdit.cli.bench_report import write_json
from tests.distributed import RankPool

METHOD = {
    "time": (
        "Cases take turns within each round; each round another one goes first. A turn: one layer "
        "to warm up, a barrier, then --layers layers back to back; its time is from the first "
        "rank's start to the last rank's end, divided by the layers. Median and quartiles over "
        "quiet rounds: those in which other processes and the hypervisor together used at most "
        "--max-other-cores cores."
    ),
    "ratio": "Median and quartiles over rounds of the two times of one round, divided.",
    "cpu": "Process CPU time of a layer, all threads, summed over ranks; median over rounds.",
    "overhead": (
        "Per rank and layer: CPU time of the thread in attention(), minus its CPU time inside the "
        "attention kernel, merges and tensor copies, each call metered with "
        "CLOCK_THREAD_CPUTIME_ID where it happens, minus the metering's own cost (calibrated on "
        "empty calls). So Python, checks, flags, allocation and looking for peers' signals count, "
        "with caches as the real layer leaves them; sleeping until a peer signals does not. "
        "Median over layers, the slowest rank."
    ),
}
# Ranks stay on the CPU where there is a GPU too; and they leave the terminal to the benchmark.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "LOG_LEVEL": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
HEADINGS = ("case", "ms (quartiles)", "of best stock", "of floor", "CPU ms", "error", "overhead us")


def main() -> None:
    parser = _parser()
    arguments = vars(parser.parse_args())
    path, timeout_s = arguments.pop("json"), arguments.pop("timeout")
    try:
        settings = Settings(**arguments)
    except ValueError as error:
        parser.error(str(error))
    os.environ.update(ENVIRONMENT)
    load_average = os.getloadavg()[0]
    with RankPool(settings.ranks) as pool:
        ranks = pool.run(measure, settings, timeout_s=timeout_s)
    report = _report(settings, ranks)
    report["load"]["load_average_before"] = round(load_average, 2)
    _show(report)
    if path:
        write_json(path, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_layer", description=(__doc__ or "").splitlines()[0]
    )
    for name, default, text in (
        ("ranks", 4, "processes, one thread each"),
        ("machines", 2, "machines that the ranks are split over"),
        ("seq", 4096, "rows of the whole sequence"),
        ("heads", 8, "attention heads"),
        ("head-dim", 64, "elements of a head"),
        ("rounds", 15, "quiet rounds, in each of which every case is timed once"),
        ("layers", 3, "layers in one timing"),
        ("max-other-cores", 0.2, "what a quiet round leaves to others, in cores"),
        ("timeout", 1800, "seconds after which the run is given up"),
    ):
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default {default})"
        )
    parser.add_argument("--dtype", choices=sorted(MAX_ERROR), default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    return parser


def _report(settings: Settings, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    quiet = [idx for idx, one in enumerate(ranks[0]["rounds"]) if one["quiet"]]
    if len(quiet) < settings.rounds:
        raise SystemExit(
            f"only {len(quiet)} of {len(ranks[0]['rounds'])} rounds were quiet, "
            f"{settings.rounds} are needed: others are busy here, see --max-other-cores"
        )
    results = [_result(case, ranks, quiet, settings) for case in settings.cases()]
    best = min((r for r in results if r["kind"] == "stock"), key=lambda r: r["ms"]["median"])
    floor = next(r for r in results if r["kind"] == "floor")
    for result in results:
        result["of_best_stock"] = _ratio(result, best)
        result["of_floor"] = _ratio(result, floor)
    loads = [ranks[0]["rounds"][idx]["load"] for idx in quiet]
    return {
        **provenance("cpu_layer", __doc__),
        **environment(),
        "load": {
            "rounds": len(ranks[0]["rounds"]),
            "quiet_rounds": len(quiet),
            **{name: _spread([load[name] for load in loads]) for name in loads[0]},
        },
        "settings": dataclasses.asdict(settings),
        "method": METHOD,
        "best_stock": best["name"],
        "results": results,
    }


def _result(
    case: Case, ranks: list[dict[str, Any]], quiet: list[int], settings: Settings
) -> dict[str, Any]:
    wall_ms, cpu_ms = [], []
    for idx in quiet:
        starts, ends, cpus = zip(
            *(rank["rounds"][idx]["turns"][case.name] for rank in ranks), strict=True
        )
        wall_ms.append((max(ends) - min(starts)) / 1e6 / settings.layers)
        cpu_ms.append(sum(cpus) / 1e6 / settings.layers)
    result = {
        "kind": case.kind,
        "name": case.name,
        "relative_error": max(rank["errors"][case.name] for rank in ranks),
        "ms": _spread(wall_ms),
        "cpu_ms_all_ranks": round(statistics.median(cpu_ms), 3),
        "samples_ms": [round(sample, 3) for sample in wall_ms],
    }
    if case.kind == "ours":
        by_rows = [rank["overhead"][case.name] for rank in ranks]
        result["cpu_us_per_layer"] = {
            f"{rows} rows a rank": _slowest([parts[rows] for parts in by_rows])
            for rows in by_rows[0]
        }
    return result


def _spread(samples: list[float]) -> dict[str, float]:
    low, middle, high = quartiles(samples)
    return {"q1": round(low, 3), "median": round(middle, 3), "q3": round(high, 3)}


def _slowest(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Every part's median over layers, on the rank where it is largest."""
    names = sorted({name for parts in ranks for name in parts})
    return {
        name: round(max(statistics.median(parts.get(name, [0.0])) for parts in ranks), 1)
        for name in names
    }


def _ratio(result: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    pairs = zip(result["samples_ms"], base["samples_ms"], strict=True)
    return _spread([mine / theirs for mine, theirs in pairs])


def _show(report: dict[str, Any]) -> None:
    settings, hardware, load = report["settings"], report["hardware"], report["load"]
    table = Table(
        title=f"One attention layer: S={settings['seq']} H={settings['heads']} "
        f"D={settings['head_dim']} {settings['dtype']}, {settings['ranks']} ranks as "
        f"{settings['machines']} machines, {hardware['cpu']} with {hardware['cores']} cores"
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    kind = None
    for result in report["results"]:
        if result["kind"] != kind:
            table.add_section()
        kind = result["kind"]
        table.add_row(*_row(result))
    console = Console(highlight=False, width=None if Console().is_terminal else 130)
    console.print(table)
    console.print(
        f"T, U, R: degrees of torus, ulysses, ring. combined: q, k, v in one all-to-all. Overhead "
        f"in brackets: at {SMALL_ROWS} rows a rank, so with warm caches.\n"
        f"Best stock: {report['best_stock']}. Cores used by others meanwhile (median): "
        f"{load['other_cores']['median']}, by the hypervisor: {load['stolen_cores']['median']}; "
        f"{load['quiet_rounds']} of {load['rounds']} rounds were quiet."
    )
    for name, text in METHOD.items():
        console.print(f"{name}: {text}")


def _row(result: dict[str, Any]) -> list[str]:
    overhead = [f"{parts['overhead']:.0f}" for parts in result.get("cpu_us_per_layer", {}).values()]
    return [
        result["name"],
        _text(result["ms"], 1),
        _text(result["of_best_stock"], 2),
        f"{result['of_floor']['median']:.2f}",
        f"{result['cpu_ms_all_ranks']:.0f}",
        f"{result['relative_error']:.1e}",
        f"{overhead[0]} ({overhead[-1]})" if overhead else "",
    ]


def _text(spread: dict[str, float], digits: int) -> str:
    low, middle, high = (f"{spread[name]:.{digits}f}" for name in ("q1", "median", "q3"))
    return f"{middle} ({low}-{high})"


if __name__ == "__main__":
    main()
