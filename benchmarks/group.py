"""What does a group of many GPUs do: is it exact, how fast is each mesh, does it hold, does it end?

    python -m benchmarks.group --output DIR              all GPUs of this host
    python -m benchmarks.group --output DIR --cpu 8      the same on CPU ranks, in small
    ... --shapes flux1024 --sizes 1024                   on GPUs in small, to see that all runs

Runs the tests and benchmarks that take more than two ranks, one after another, each with a time of
its own, and goes on where one fails. DIR gets their files; the table at the end says what each took
and how it ended. Groups are one machine, two and more machines played on this host, and hosts that
NCCL reaches over TCP.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from swiftfusion_xdit.cli.bench_report import tables_console

SHAPES = "flux1024,flux2048,flux3072,wan480,wan720"
TCP_SHAPES = ("flux3072", "wan480")  # of these, if they are among the shapes
SIZES = "1024,2048,3072"
CPU_SHAPE = "1,1024,8,64"


@dataclass(frozen=True)
class Stage:
    """One command, and how long it may take."""

    name: str
    command: tuple[str, ...]
    seconds: int


def meshes(ranks: int) -> list[str]:
    """The meshes of one machine and of several that a group of this size is tried on."""
    found = [(1, 1, ranks), (1, ranks, 1), (ranks, 1, 1)]
    for torus in (2, 4):
        if ranks % torus == 0 and ranks > torus:
            found += [(torus, 1, ranks // torus), (torus, ranks // torus, 1)]
    return [f"torus={t},ulysses={u},ring={r}" for t, u, r in dict.fromkeys(found)]


def machine_counts(ranks: int) -> list[int]:
    return [count for count in (1, 2, 4, 8) if count <= ranks and ranks % count == 0]


def stages(
    ranks: int, output: Path, *, on_gpu: bool, shapes: str = SHAPES, sizes: str = SIZES
) -> list[Stage]:
    """Everything that is run, in this order. On GPUs: the layers' shapes and FLUX.1's sizes."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    layer = (sys.executable, "-m", "swiftfusion_xdit", "bench", "layer", "--ranks", str(ranks))
    step = (sys.executable, "-m", "benchmarks.model_step", "--ranks", str(ranks))
    again = ("--layer-graphs",) if on_gpu else ()
    place = ("--device", "cuda" if on_gpu else "cpu", "--shapes", shapes if on_gpu else CPU_SHAPE)
    if on_gpu:
        gpu_tests = "tests/gpu/test_sequence_parallel.py"
        plan = [
            Stage("exact", (*pytest, "-m", "not slow", gpu_tests), 600),
            Stage("compiled", (*pytest, "tests/gpu/test_compile.py"), 400),
            Stage("transport nccl", (*pytest, "tests/gpu/test_comm_nccl.py"), 300),
        ]
    else:
        exact = ("tests/test_sp_every_mesh.py", "-k", f"against_the_oracle and {ranks}")
        plan = [Stage("exact", (*pytest, *exact), 600)]
    for machines in machine_counts(ranks):
        name = f"layer_{machines}_machines"
        words = (*place, "--machines", str(machines), *again)
        plan.append(Stage(name, (*layer, *words, *_json(output, name)), 500))
    # Apart from the schedules: each case keeps its symmetric memory until its shape is done.
    words = (*place, "--strategies", "torus", "--schedules", "auto,torus")
    words += tuple(word for mesh in meshes(ranks) for word in ("--mesh", mesh))
    words += ("--backends", "fa4") if on_gpu else ()
    plan.append(Stage("meshes", (*layer, *words, *_json(output, "meshes")), 300))
    words = ("--sizes", sizes, *again) if on_gpu else ("--tiny", "--sizes", "128")
    plan.append(Stage("flux_step", (*step, *words, *_json(output, "flux_step")), 500))
    words = ("--model", "wan", *(("--sizes", "480p") if on_gpu else ("--tiny",)))
    plan.append(Stage("wan_step", (*step, *words, *_json(output, "wan_step")), 500))
    if on_gpu:
        over_tcp = [name for name in shapes.split(",") if name in TCP_SHAPES] or [shapes]
        for hosts in machine_counts(ranks)[1:]:
            name = f"tcp_{hosts}_hosts"
            words = ("--tcp", "--transport", "nccl", "--machines", str(hosts), "--no-graph")
            words += ("--shapes", ",".join(over_tcp), "--schedules", "torus", "--parts")
            plan.append(Stage(name, (*layer, *words, *_json(output, name)), 300))
        plan.append(Stage("ten thousand layers", (*pytest, "-m", "slow", gpu_tests), 400))
        plan.append(Stage("a rank dies", (*pytest, "tests/gpu/test_killed_rank.py"), 200))
    else:
        plan.append(Stage("a rank dies", (*pytest, "tests/test_sp_killed_rank.py"), 200))
    return plan


def _json(output: Path, name: str) -> tuple[str, str]:
    return "--json", str(output / f"{name}.json")


def run(stage: Stage, log: Path) -> tuple[str, float]:
    """How the stage ended, and the seconds that it took."""
    start_s = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            stage.command, stdout=file, stderr=subprocess.STDOUT, env=os.environ
        )
        try:
            status = process.wait(timeout=stage.seconds)
            ended = "passed" if status == 0 else f"status {status}, see {log.name}"
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            ended = f"no end within {stage.seconds} s"
    return ended, time.monotonic() - start_s


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.group", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for files and logs")
    parser.add_argument("--cpu", type=int, metavar="RANKS", help="CPU ranks instead of GPUs")
    parser.add_argument("--shapes", default=SHAPES, help=f"of layers on GPUs ({SHAPES})")
    parser.add_argument("--sizes", default=SIZES, help=f"of images on GPUs ({SIZES})")
    parser.add_argument("--only", default="", help="stages by their names, with commas between")
    parser.add_argument("--list", action="store_true", help="show the stages and run none")
    args = parser.parse_args()
    ranks = args.cpu
    if ranks is None:
        import torch

        ranks = torch.cuda.device_count()
    if ranks < 2:
        parser.error(f"a group has at least 2 ranks, got {ranks}; --cpu 8 needs no GPU")
    plan = stages(ranks, args.output, on_gpu=args.cpu is None, shapes=args.shapes, sizes=args.sizes)
    wanted = [word.strip() for word in args.only.split(",") if word.strip()]
    if unknown := set(wanted) - {stage.name for stage in plan}:
        parser.error(f"--only must name stages, got {', '.join(sorted(unknown))}")
    plan = [stage for stage in plan if not wanted or stage.name in wanted]
    table = Table(title=f"{ranks} ranks")
    for heading in ("stage", "seconds", "ended"):
        table.add_column(heading, overflow="fold")
    all_passed = True
    args.output.mkdir(parents=True, exist_ok=True)
    for stage in plan:
        if args.list:
            table.add_row(stage.name, f"{stage.seconds} at most", " ".join(stage.command[1:]))
            continue
        ended, took_s = run(stage, args.output / f"{stage.name.replace(' ', '_')}.log")
        all_passed &= ended == "passed"
        table.add_row(stage.name, f"{took_s:.0f}", ended)
        print(f"{stage.name}: {ended}, {took_s:.0f} s", flush=True)
    tables_console().print(table)
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
