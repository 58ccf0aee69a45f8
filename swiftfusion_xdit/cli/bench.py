"""`swiftfusion bench layer`: one attention layer, each way to run it, in turn in one run.

Ours, xDiT's own USP and the local kernel alone (the floor: what a layer costs if communication were
free), on all GPUs of this host or on CPU ranks. Every output is checked first.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from swiftfusion_xdit.cli import bench_report as reports
from swiftfusion_xdit.cli.bench_config import SHAPES, BenchConfig, parse_shapes
from swiftfusion_xdit.envs import SCHEDULES

CPU_SHAPE = "1,1024,8,64"
CPU_RANKS = 2
Report = dict[str, Any]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` to the command line."""
    bench = subparsers.add_parser("bench", help="measure attention layers, and show what was found")
    kinds = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    pages = kinds.add_parser("report", help="a page and pictures from files of results")
    pages.add_argument("results", type=Path, metavar="RESULTS", help="a folder of --json files")
    pages.add_argument(
        "--output", type=Path, required=True, help="folder for pictures; the page is OUTPUT.md"
    )
    pages.set_defaults(run=run_report)
    parser = kinds.add_parser(
        "layer",
        help="one attention layer: ours, xDiT's and the kernel alone",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_layer_arguments(parser)
    parser.set_defaults(run=run)


def _add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs if any")
    add("--shapes", help=f"of {','.join(SHAPES)} or custom B,S,H,D (all; on CPU {CPU_SHAPE})")
    add("--strategies", help="of usp,tas,torus (usp,torus; tas too with --machines above 1)")
    schedules = ",".join(SCHEDULES)
    add("--schedules", default=schedules, help=f"of {schedules} (all)")
    add("--groups", default="", help="head groups to force too, if a schedule has them, as 1,2")
    add("--backends", help="local kernels (fa4,cudnn; on CPU cpu)")
    add("--mesh", action="append", help="also this mesh, as torus=T,ulysses=U,ring=R; repeatable")
    add("--ranks", type=int, help=f"ranks (all GPUs; on CPU {CPU_RANKS})")
    add("--machines", type=int, default=1, help="machines the ranks are split over (1)")
    add("--transport", default="auto", help="as --sp-transport; of several, each (auto)")
    add("--tcp", action="store_true", help="NCCL takes TCP between machines: play several hosts")
    add("--dtype", help="bfloat16, float16, float32 (bfloat16; on CPU float32)")
    add("--graph", action=argparse.BooleanOptionalAction, help="also CUDA graphs (on GPUs)")
    add("--stock-graph", action="store_true", help="xDiT's function in CUDA graphs too")
    add("--layer-graphs", action="store_true", help="torus with SWIFTFUSION_LAYER_GRAPHS=0 and 1")
    add("--parts", action="store_true", help="also the communication of torus alone")
    add("--rounds", type=int, help="rounds of turns (by --seconds)")
    add("--seconds", type=float, default=4.0, help="for the rounds of one shape (4)")
    add("--timeout", type=float, default=600.0, help="seconds for the whole run (600)")
    add("--json", type=Path, metavar="FILE", help="write the results here too, after each shape")


def layer_defaults() -> dict[str, Any]:
    """What `bench layer` is called with where nothing is said, for benchmarks that build on it."""
    parser = argparse.ArgumentParser()
    _add_layer_arguments(parser)
    return vars(parser.parse_args([]))


def run_report(args: argparse.Namespace) -> int:
    """Write the page. 0: done; 2: bad arguments."""
    from swiftfusion_xdit.cli import performance

    try:
        for path in performance.write(args.results, args.output):
            print(path)
    except (ValueError, ImportError) as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        console.print(f"swiftfusion bench report: error: {error}", style="red")
        return 2
    return 0


def run(args: argparse.Namespace) -> int:
    """Run the benchmark. 0: all of ours ran and agree; 1: one did not; 2: bad arguments."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        config = make_config(args)
    except ValueError as error:
        console.print(f"swiftfusion bench: error: {error}", style="red")
        return 2
    report = guarded("swiftfusion bench", console, lambda: _run(config, args.json, console))
    if isinstance(report, int):
        return report
    wrong = [line for summary in report["shapes"] for line in reports.broken(summary)]
    for line in wrong:
        console.print(f"failed: {line}", style="red")
    return 1 if wrong else 0


def guarded(name: str, console: Console, go: Callable[[], Report]) -> Report | int:
    """What ``go`` returns; where it ends early, the exit status, and ``console`` says why."""
    from swiftfusion_xdit.cli.bench_launch import BenchError

    try:
        with _terminated_by_signal():
            return go()
    except BenchError as error:
        console.print(f"{name}: {error}", style="red")
        return 1
    except KeyboardInterrupt:
        console.print(f"{name}: interrupted; its ranks have ended", style="red")
        return 130


def make_config(args: argparse.Namespace) -> BenchConfig:
    """The arguments with their defaults for this machine.

    Raises:
        ValueError: an argument that is wrong, or that this machine cannot serve.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    device = args.device if args.device != "auto" else ("cuda" if num_gpus else "cpu")
    on_gpu = device == "cuda"
    ranks = args.ranks if args.ranks is not None else (num_gpus if on_gpu else CPU_RANKS)
    if on_gpu and num_gpus < max(2, ranks):
        raise ValueError(
            f"--ranks on GPUs need one GPU each, at least 2: {ranks} ranks, {num_gpus} GPUs here; "
            "--device cpu runs without"
        )
    strategies = "usp,tas,torus" if args.machines > 1 else "usp,torus"
    return BenchConfig(
        device=device,
        shapes=parse_shapes(args.shapes or (",".join(SHAPES) if on_gpu else CPU_SHAPE)),
        strategies=_words(args.strategies or strategies),
        schedules=_words(args.schedules),
        backends=_words(args.backends or ("fa4,cudnn" if on_gpu else "cpu")),
        groups=_numbers("--groups", args.groups),
        meshes=(None, *dict.fromkeys(args.mesh or ())),
        ranks=ranks,
        machines=args.machines,
        transports=_words(args.transport),
        dtype=args.dtype or ("bfloat16" if on_gpu else "float32"),
        graph=on_gpu if args.graph is None else args.graph,
        stock_graph=args.stock_graph,
        layer_graphs=args.layer_graphs,
        parts=args.parts,
        tcp=args.tcp,
        rounds=args.rounds,
        seconds=args.seconds,
        timeout_s=args.timeout,
    )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    words = _words(text)
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{flag} must be whole numbers with commas between, got {text!r}")
    return tuple(int(word) for word in words)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _run(config: BenchConfig, path: Path | None, console: Console) -> Report:
    report: Report = {
        "benchmark": "layer",
        "command": shlex.join(["swiftfusion", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": dataclasses.asdict(config),
        "method": reports.METHOD,
        "shapes": [],
    }
    tables = collect(config, report, path, console)
    for line in _best_lines(report["shapes"]):
        tables.print(line)
    console.print(f"{report['seconds']} s; medians; {reports.METHOD['floor']}")
    return report


def collect(config: BenchConfig, report: Report, path: Path | None, console: Console) -> Console:
    """Run the ranks; each shape goes into ``report``, into the file and, as a table, to stdout.

    Returns the console of the tables.

    Raises:
        BenchError: see ``bench_launch.run_ranks``.
    """
    from swiftfusion_xdit.cli.bench_launch import run_ranks

    tables, start_s = reports.tables_console(), time.monotonic()

    def take(kind: str, value: dict[str, Any]) -> None:
        if kind == "machine":
            report.update(value)
            console.print(f"ranks are up after {time.monotonic() - start_s:.1f} s")
            return
        summary = reports.summarise(value)
        report["shapes"].append(summary)
        report["seconds"] = round(time.monotonic() - start_s, 1)
        tables.print(reports.layer_table(summary, dtype=config.dtype, ranks=config.ranks))
        if path is not None:
            reports.write_json(path, report)

    names = ", ".join(shape.name for shape in config.shapes)
    console.print(f"{config.ranks} ranks, {len(config.cases())} cases of {names}")
    run_ranks(config, take)
    return tables


def _best_lines(summaries: list[dict[str, Any]]) -> Iterator[str]:
    """The best of ours and of xDiT's over the floor, a line per shape."""
    for summary in summaries:
        ours = reports.best(summary, ("torus",))
        stock = reports.best(summary, ("usp", "tas"))
        found = [
            f"{label} {ratio[0]:.3f} of the floor ({ratio[1]})"
            for label, ratio in (("ours", ours), ("xDiT", stock))
            if ratio is not None
        ]
        yield f"{summary['shape']['name']}: {'; '.join(found) or 'nothing ran'}"


@contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """SIGTERM raises, as Ctrl-C does, so that the ranks are ended."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
