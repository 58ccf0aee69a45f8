"""`swiftfusion simulate`: predict a model's step on a cluster that need not be here.

The schedules are those that the runtime executes; the cluster is a preset or a YAML file. With
`--paper` it predicts the SwiftFusion paper's table, and with `--measured` what was measured on two
H200, each with the error of every row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from swiftfusion_xdit.cli import simulate_report as reports
from swiftfusion_xdit.clusters import PRESETS, load, preset, resize
from swiftfusion_xdit.envs import SCHEDULES
from swiftfusion_xdit.mesh import Mesh, paper_mesh, torus_mesh, usp_mesh
from swiftfusion_xdit.schedule import GROUPED
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.layer import LayerTime
from swiftfusion_xdit.simulate.models import ALIASES, MODELS, Model, model_named
from swiftfusion_xdit.simulate.paper import STOCK_MERGE_PASSES
from swiftfusion_xdit.simulate.search import Candidate, best, schedules_on
from swiftfusion_xdit.simulate.step import Strategy, simulate_step
from swiftfusion_xdit.simulate.transport import nccl, one_sided, stock

STRATEGIES = {"usp": usp_mesh, "tas": paper_mesh, "torus": torus_mesh}
TRANSPORTS = {"one-sided": one_sided, "nccl": nccl}
MOST_DRAWN_RANKS = 8


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Add what is asked of which cluster: its size, and the model's."""
    add = parser.add_argument
    add("--machines", type=int, help="number of machines (the topology's)")
    add("--gpus-per-machine", type=int, help="GPUs of each machine (the topology's)")
    add("--model", default="flux", help=f"{', '.join([*MODELS, *ALIASES])} (flux)")
    add("--size", help="pixels: 3072, or 768x1360 as height x width (the model's example)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--frames", type=int, help="of a video (the model's example)")
    length.add_argument("--seconds", type=float, help="of a video, instead of --frames")
    add("--batch", type=int, default=1, help="samples attended at once (1)")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate` to the command line."""
    parser = subparsers.add_parser(
        "simulate",
        help="predict a model's step on a cluster that need not be here",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--topology", default="p4de", help=f"{', '.join(PRESETS)} or a YAML file (p4de)")
    add_workload(parser)
    add("--strategy", choices=STRATEGIES, default="torus", help="(torus)")
    add("--schedule", choices=SCHEDULES, default="auto", help="of torus; auto: the fastest")
    add("--groups", type=int, help="head groups of --schedule, where it has them (the fastest)")
    add("--mesh", help="torus=T,ulysses=U,ring=R (the strategy's rule)")
    add("--transport", choices=TRANSPORTS, default="one-sided", help="of torus (one-sided)")
    add("--timeline", type=Path, metavar="PNG", help="draw one layer")
    add("--trace", type=Path, metavar="JSON", help="write one layer for Perfetto")
    add("--paper", action="store_true", help="predict the SwiftFusion paper's table")
    add("--measured", action="store_true", help="compare with what two H200 measured")
    add("--markdown", action="store_true", help="tables as Markdown")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Simulate and print. 0: done; 2: bad arguments."""
    try:
        if args.paper or args.measured:
            tables = reports.paper_tables(_p4de) if args.paper else []
            tables += reports.measured_tables(preset("h200-2")) if args.measured else []
        else:
            tables = simulate(args)
    except (ValueError, ImportError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
            f"swiftfusion simulate: error: {error}", style="red"
        )
        return 2
    if args.markdown:
        sys.stdout.write("\n".join(table.markdown() for table in tables))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
        for table in tables:
            console.print(table.rich())
    return 0


def _p4de(num_machines: int) -> Cluster:
    return preset("p4de", num_machines=num_machines)


def simulate(args: argparse.Namespace) -> list[reports.Table]:
    """The step asked for, beside USP's; draws and writes what was asked for.

    Raises:
        ValueError: an argument that is wrong; the message names it.
    """
    cluster = resize(
        load(args.topology), num_machines=args.machines, gpus_per_machine=args.gpus_per_machine
    )
    model = model_named(args.model)
    sequence = sequence_of(args, model)
    mesh = Mesh.parse(args.mesh) if args.mesh else None
    baseline = usp_mesh(cluster.topology, model.num_heads)
    found = [_best(args, cluster, model, sequence, "usp", baseline)]
    if args.strategy == "torus" and args.schedule == "fused":
        mesh = mesh or Mesh(ring=cluster.num_ranks)
        if mesh.num_head_groups > 1 or cluster.num_machines > 1:
            raise ValueError(
                "--schedule fused needs one machine and a mesh with torus=1 and ulysses=1, got "
                f"{cluster.num_machines} machines and {mesh}"
            )
    if (args.strategy, mesh) != ("usp", None):
        mesh = mesh or STRATEGIES[args.strategy](cluster.topology, model.num_heads)
        found.append(_best(args, cluster, model, sequence, args.strategy, mesh))
    if args.timeline or args.trace:
        _draw(args, cluster, model, sequence, found[-1].strategy)
    return [reports.step_table(model, cluster, sequence, found)]


def sequence_of(args: argparse.Namespace, model: Model) -> int:
    """Rows of attention for --size and --frames or --seconds.

    Raises:
        ValueError: a size that cannot be read, or that the model does not have.
    """
    height, width = model.size
    if args.size:
        sides = args.size.lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f"--size must look like 3072 or 768x1360, got {args.size!r}")
        height, width = int(sides[0]), int(sides[-1])
    frames = args.frames if args.frames is not None else model.frames
    if args.seconds is not None:
        frames = model.frames_of(args.seconds)
    return model.sequence(height, width, frames)


def _best(
    args: argparse.Namespace,
    cluster: Cluster,
    model: Model,
    sequence: int,
    name: str,
    mesh: Mesh,
) -> Candidate:
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.groups is not None and args.schedule not in GROUPED:
        raise ValueError(
            f"--groups needs --schedule torus, pipelined or fused, got {args.schedule!r}"
        )
    mesh.require(num_ranks=cluster.num_ranks, num_heads=model.num_heads)
    if name == "torus":
        transport = TRANSPORTS[args.transport]()
        candidates = [
            strategy
            for strategy in schedules_on(mesh, model.num_heads, transport)
            if args.schedule in ("auto", strategy.schedule)
            and args.groups in (None, strategy.groups_per_rank)
        ]
        most = model.num_heads // mesh.num_head_groups
        if args.schedule == "torus":  # alone, its head groups are for those who ask for them
            most = 1 if mesh.torus > 1 else most
            if args.groups in range(2, most + 1):
                candidates = [Strategy("torus", mesh, transport, transport, args.groups)]
        if not candidates:
            raise ValueError(f"--groups must be 1 to {most} on {mesh}, got {args.groups}")
    else:
        candidates = [Strategy("usp", mesh, stock(), stock(), 1, STOCK_MERGE_PASSES)]
    return best(model, cluster, sequence, candidates, batch=args.batch)


def _draw(
    args: argparse.Namespace, cluster: Cluster, model: Model, sequence: int, strategy: Strategy
) -> None:
    from swiftfusion_xdit.simulate.timeline import draw, write_chrome_trace

    symmetric = False if cluster.num_ranks <= MOST_DRAWN_RANKS else None
    layer: LayerTime = simulate_step(
        model, cluster, strategy, sequence=sequence, batch=args.batch, symmetric=symmetric
    ).layer
    events = [event for event in layer.events() if event.rank < MOST_DRAWN_RANKS]
    ranks = (
        f"rank 0, which stands for all {cluster.num_ranks}"
        if layer.symmetric
        else (f"{min(MOST_DRAWN_RANKS, cluster.num_ranks)} of {cluster.num_ranks} ranks")
    )
    title = f"Simulated: {model.name}, {sequence} rows, {cluster.name}, {strategy}; {ranks}"
    if args.timeline:
        draw(events, args.timeline, title=title)
    if args.trace:
        write_chrome_trace(events, args.trace)
