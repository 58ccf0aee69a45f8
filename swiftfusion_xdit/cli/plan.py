"""`swiftfusion plan`: how to run a model on a cluster, by predicted step time.

Predicts a step for xDiT's own exchange (usp), the same on topology-aware groups (tas) and Torus
Attention (torus), on each of their meshes, and prints the command for the fastest.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from math import gcd
from typing import Any

from rich.console import Console
from rich.table import Table

from swiftfusion_xdit.cli.simulate import add_workload, sequence_of
from swiftfusion_xdit.clusters import HOME, PRESETS, home_of, load, resize
from swiftfusion_xdit.planner import POLICIES, THOROUGH, Choice, Outcome, Prediction, plan
from swiftfusion_xdit.planner.candidates import STRATEGIES, Candidate
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.models import Model, model_named
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.step import rest_us

MOST_ROWS = 12
EXHAUSTIVE_RANKS = 32  # up to here every candidate is predicted
# What xDiT calls them: `xdit --model`, or the example that runs what its command does not.
XDIT_MODELS = {
    "flux": ("xdit", "black-forest-labs/FLUX.1-dev"),
    "wan2.1-14b": ("xdit", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    "hunyuanvideo": ("xdit", "tencent/HunyuanVideo"),
    "cogvideox-5b": ("examples/cogvideox_example.py", "THUDM/CogVideoX-5b"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="choose strategy, mesh and schedule for a model on a cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--topology", help=f"{', '.join(PRESETS)} or a YAML file (that of --gpu)")
    add("--gpu", help=f"instead of --topology: {', '.join(HOME)} in their usual machines (a100)")
    add_workload(parser)
    add("--degrees", help="axes that are fixed, as in torus=4,ring=2")
    add("--policy", choices=POLICIES, default="fastest", help="of torus (fastest)")
    add("--all", action="store_true", help=f"every candidate, not the first {MOST_ROWS}")
    add("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan and print. 0: done; 2: bad arguments."""
    try:
        report = make_report(args)
    except ValueError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
            f"swiftfusion plan: error: {error}", style="red"
        )
        return 2
    if args.json:
        json.dump(report.as_dict(), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
        report.print(console, most_rows=None if args.all else MOST_ROWS)
    return 0


def make_report(args: argparse.Namespace) -> Report:
    """Plan every strategy.

    Raises:
        ValueError: an argument that is wrong; the message names it.
    """
    if args.topology and args.gpu:
        raise ValueError("--topology names its GPU: give it or --gpu, not both")
    cluster = resize(
        load(args.topology or home_of(args.gpu or "a100")),
        num_machines=args.machines,
        gpus_per_machine=args.gpus_per_machine,
    )
    model = model_named(args.model)
    sequence = sequence_of(args, model)
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    shape = LayerShape.even(
        cluster.num_ranks,
        sequence=sequence,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        batch=args.batch,
    )
    choices = _plan_all(args, cluster, shape)
    rest = model.num_layers * rest_us(model, cluster, args.batch * max(shape.query_lengths))
    return Report(cluster, model, sequence, rest, choices, _size_flags(args, model))


def _plan_all(args: argparse.Namespace, cluster: Cluster, shape: LayerShape) -> list[Choice]:
    effort = None if cluster.num_ranks <= EXHAUSTIVE_RANKS else THOROUGH
    choices = []
    for strategy in STRATEGIES:
        policy = args.policy if strategy == "torus" else "fastest"
        try:
            choices.append(
                plan(
                    cluster,
                    shape,
                    args.degrees,
                    strategies=(strategy,),
                    policy=policy,
                    effort=effort,
                )
            )
        except ValueError:
            if strategy == "torus":  # which takes the most meshes: no other has one
                raise
    return choices


@dataclass(frozen=True)
class Report:
    """The plans of all strategies for one step of a model."""

    cluster: Cluster
    model: Model
    sequence: int
    rest_us: float
    choices: list[Choice]
    size_flags: str

    def rows(self) -> list[tuple[Candidate, Prediction, str]]:
        """Everything that was predicted, best first, with the reason against it."""
        found = [(choice.candidate, choice.prediction) for choice in self.choices]
        for choice in self.choices:
            found += [(o.candidate, o.prediction) for o in choice.others if o.prediction]
        found.sort(key=lambda row: (row[1].layer_us, str(row[0])))
        best_us = self.step_us(found[0][1])
        return [(c, p, self._verdict(self.step_us(p) / best_us)) for c, p in found]

    def refused(self) -> list[Outcome]:
        return [o for choice in self.choices for o in choice.others if o.prediction is None]

    def step_us(self, found: Prediction) -> float:
        return self.model.num_layers * found.layer_us + self.rest_us

    @staticmethod
    def _verdict(ratio: float) -> str:
        return "best" if ratio == 1 else f"{ratio - 1:+.1%}"

    def command(self, candidate: Candidate) -> str:
        """The xDiT command line, for each machine."""
        program, name = XDIT_MODELS[self.model.name]
        machines, gpus = self.cluster.num_machines, self.cluster.gpus_per_machine
        mesh = candidate.mesh
        num_groups = gcd(mesh.size, self.model.num_heads)
        if candidate.strategy == "usp":
            num_groups = mesh.ulysses
        launcher = "xdit" if program == "xdit" else "python -m torch.distributed.run"
        words = [launcher]
        if machines > 1:
            words.append(f"--nnodes {machines} --node_rank RANK --master_addr HOST")
        words.append(f"--nproc_per_node {gpus}")
        if program != "xdit":
            words.append(program)
        words.append(f"--model {name} --ulysses_degree {num_groups}")
        words.append(f"--ring_degree {mesh.size // num_groups} {self.size_flags}")
        words.append(f"--sp-strategy {candidate.strategy}")
        if candidate.strategy != "usp":
            words.append(f"--sp-mesh {mesh}")
        # Head groups and whole rounds have no flag: on this mesh the run's own planner finds them.
        is_planned = candidate.groups_per_rank > 1 or candidate.whole_rounds
        if candidate.strategy == "torus" and not is_planned:
            words.append(f"--sp-schedule {candidate.schedule}")
        return " ".join(words)

    def as_dict(self) -> dict[str, Any]:
        best = self.rows()[0][0]
        return {
            "cluster": self.cluster.name,
            "machines": self.cluster.num_machines,
            "gpus_per_machine": self.cluster.gpus_per_machine,
            "model": self.model.name,
            "rows": self.sequence,
            "layers": self.model.num_layers,
            "command": self.command(best),
            "candidates": [self._entry(c, p) for c, p, _ in self.rows()],
            "not_predicted": [{**_names(o.candidate), "reason": o.reason} for o in self.refused()],
        }

    def _entry(self, candidate: Candidate, found: Prediction) -> dict[str, Any]:
        return {
            **_names(candidate),
            "step_ms": self.step_us(found) / 1e3,
            "exposed_ms": self.model.num_layers * found.exposed_us / 1e3,
            "layer_us": found.layer_us,
            "floor_us": found.floor_us,
            "bytes_across_per_layer": found.bytes_across,
            "symmetric_bytes": found.symmetric_bytes,
        }

    def print(self, console: Console, *, most_rows: int | None) -> None:
        cluster, model = self.cluster, self.model
        title = (
            f"{model.name}, {self.sequence} rows, on {cluster.num_machines} x "
            f"{cluster.gpus_per_machine} {cluster.gpu.name} ({cluster.name})"
        )
        table = Table(title=title)
        table.add_column("strategy, mesh, schedule")
        headings = ("step ms", "", "exposed ms", "MB across / layer", "symmetric MiB")
        for heading in headings:
            table.add_column(heading, justify="right")
        rows = self.rows()
        leaders = {str(choice.candidate) for choice in self.choices}
        shown = [
            row for i, row in enumerate(rows)
            if most_rows is None or i < most_rows or str(row[0]) in leaders
        ]  # fmt: skip
        for candidate, found, verdict in shown:
            table.add_row(
                str(candidate),
                f"{self.step_us(found) / 1e3:.1f}",
                verdict,
                f"{model.num_layers * found.exposed_us / 1e3:.1f}",
                f"{found.bytes_across / 1e6:.1f}",
                f"{found.symmetric_bytes / 2**20:.0f}",
            )
        console.print(table)
        hidden = len(rows) - len(shown)
        refused = self.refused()
        if hidden or refused:
            console.print(f"{hidden} slower ones and {len(refused)} refused ones: --all or --json")
        if most_rows is None:
            for outcome in refused:
                console.print(f"  {outcome.candidate}: {outcome.reason}")
        console.print("\nOn each machine:\n" if cluster.num_machines > 1 else "\n", end="")
        console.print(f"    {self.command(rows[0][0])}", soft_wrap=True)


def _names(candidate: Candidate) -> dict[str, Any]:
    return {
        "strategy": candidate.strategy,
        "mesh": candidate.mesh.as_dict(),
        "schedule": candidate.schedule,
        "head_groups_per_rank": candidate.groups_per_rank,
        "edge_heads": candidate.edge_heads,
    }


def _size_flags(args: argparse.Namespace, model: Model) -> str:
    height, width = model.size
    if args.size:
        sides = args.size.lower().split("x")
        height, width = int(sides[0]), int(sides[-1])
    flags = f"--height {height} --width {width}"
    frames = args.frames if args.frames is not None else model.frames
    if args.seconds is not None:
        frames = model.frames_of(args.seconds)
    return flags + (f" --num_frames {frames}" if model.fps else "")
