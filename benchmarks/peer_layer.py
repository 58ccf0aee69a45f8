"""How long does one attention layer take under other projects' sequence parallelism?

    python -m benchmarks.peer_layer [--shapes flux1024,...] [--peers diffusers,yunchang,...]

`torus` with the schedule that the planner chooses, the local kernel alone (the floor) and every
mode of every peer, on the same inputs, checked against attention in fp64 by the same rule, eager
and as CUDA graphs, in turn in the same rounds. A peer that cannot run has its reason in its row.
Modes that send 8-bit floats are let pass up to an error of 0.1, and are no candidates for "best".
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import provenance
from benchmarks.peers import NOT_RUN, PEERS
from benchmarks.peers.bench import PeerConfig
from swiftfusion_xdit.cli import bench, bench_report
from swiftfusion_xdit.cli.bench_config import SHAPES


def make_config(arguments: list[str]) -> tuple[PeerConfig, Path | None]:
    """The checked arguments, and where the JSON goes.

    Raises:
        ValueError: an argument that is wrong, or that this machine cannot serve.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer_layer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs if any")
    add("--shapes", help=f"of {','.join(SHAPES)} or custom B,S,H,D (all; on CPU {bench.CPU_SHAPE})")
    add("--backends", help="our local kernels, whose floors are measured (fa4,cudnn; on CPU cpu)")
    add("--peers", help=f"of {','.join(PEERS)} (all)")
    add("--stock", action="store_true", help="also xDiT's own USP, eager")
    add("--ranks", type=int, help=f"ranks (all GPUs; on CPU {bench.CPU_RANKS})")
    add("--dtype", help="bfloat16, float16, float32 (bfloat16; on CPU float32)")
    add("--graph", action=argparse.BooleanOptionalAction, help="also CUDA graphs (on GPUs)")
    add("--rounds", type=int, help="rounds of turns (by --seconds)")
    add("--seconds", type=float, default=4.0, help="for the rounds of one shape (4)")
    add("--timeout", type=float, default=600.0, help="seconds for the whole run (600)")
    add("--json", type=Path, metavar="FILE", help="write the results here too, after each shape")
    args = parser.parse_args(arguments)
    names = args.peers.split(",") if args.peers else list(PEERS)
    strategies = "usp,torus" if args.stock else "torus"
    fixed = {"schedules": "auto", "strategies": strategies}
    given = argparse.Namespace(**{**bench.layer_defaults(), **vars(args), **fixed})
    base = bench.make_config(given)
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return PeerConfig(**fields, peers=tuple(name.strip() for name in names)), args.json


def run(
    config: PeerConfig, path: Path | None, arguments: list[str], console: Console
) -> dict[str, Any]:
    """Measure, print the tables and write the JSON after each shape."""
    report: dict[str, Any] = {
        **provenance("peer_layer", __doc__, arguments),
        "settings": dataclasses.asdict(config),
        "method": bench_report.METHOD,
        "peers": {
            PEERS[name].name: {
                "version": PEERS[name].version(),
                "not_run": PEERS[name].reason(config.setting),
            }
            for name in config.peers
        },
        "not_run": NOT_RUN,
        "shapes": [],
    }
    tables = bench.collect(config, report, path, console)
    for line in _summary(report):
        tables.print(line)
    return report


def _summary(report: dict[str, Any]) -> Iterator[str]:
    """The versions, the best over the floor of each shape, and what was not run at all."""
    found = {name: peer["version"] or "not installed" for name, peer in report["peers"].items()}
    yield "; ".join(f"{name} {version}" for name, version in found.items())
    for summary in report["shapes"]:
        best = [
            f"{label} {ratio[0]:.3f} of the floor ({ratio[1]})"
            for label, kinds in (("ours", ("torus",)), ("xDiT", ("usp",)), ("peers", ("peer",)))
            if (ratio := bench_report.best(summary, kinds)) is not None
        ]
        yield f"{summary['shape']['name']}: {'; '.join(best) or 'nothing ran'}"
    for name, reason in report["not_run"].items():
        yield f"not run: {name} {reason}"


def main(arguments: list[str]) -> int:
    """0: all of ours ran and agree; 1: one did not; 2: bad arguments."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        config, path = make_config(arguments)
    except ValueError as error:
        console.print(f"peer_layer: error: {error}", style="red")
        return 2
    report = bench.guarded("peer_layer", console, lambda: run(config, path, arguments, console))
    if isinstance(report, int):
        return report
    wrong = [line for summary in report["shapes"] for line in bench_report.broken(summary)]
    for line in wrong:
        console.print(f"failed: {line}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
