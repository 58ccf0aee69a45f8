"""Searches schedules and meshes for the fastest step on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.models import Model
from swiftfusion_xdit.simulate.step import StepTime, Strategy, simulate_step
from swiftfusion_xdit.simulate.transport import CONSTANTS, Constants, Transport, one_sided

MOST_GROUPS = 6  # head groups of `pipelined`: the most that the runtime uses


@dataclass(frozen=True)
class Candidate:
    """One strategy and what its step takes."""

    strategy: Strategy
    step: StepTime

    @property
    def total_us(self) -> float:
        return self.step.total_us


def our_strategies(
    model: Model, cluster: Cluster, constants: Constants = CONSTANTS
) -> Iterator[Strategy]:
    """Every schedule of ours on every mesh that the heads allow, one-sided, without barriers."""
    inside = cluster.gpus_per_machine
    for ulysses in divisors(inside):
        mesh = Mesh(cluster.num_machines, ulysses, inside // ulysses)
        if mesh.num_head_groups <= model.num_heads:
            yield from schedules_on(mesh, model.num_heads, one_sided(constants))


def schedules_on(mesh: Mesh, num_heads: int, transport: Transport) -> Iterator[Strategy]:
    """Every schedule of ours on one mesh."""
    for schedule in ("torus", "folded"):
        yield Strategy(schedule, mesh, transport, transport)
    if mesh.num_head_groups == 1 < mesh.size and not transport.two_sided:
        for groups in range(1, min(MOST_GROUPS, num_heads) + 1):
            yield Strategy("fused", mesh, transport, transport, groups)
    for groups in range(1, min(MOST_GROUPS, num_heads // mesh.num_head_groups) + 1):
        yield Strategy("pipelined", mesh, transport, transport, groups)


def rank_strategies(
    model: Model,
    cluster: Cluster,
    sequence: int,
    candidates: Iterable[Strategy],
    *,
    batch: int = 1,
) -> list[Candidate]:
    """The candidates, fastest first; ties keep their order."""
    simulated = [
        Candidate(strategy, simulate_step(model, cluster, strategy, sequence=sequence, batch=batch))
        for strategy in candidates
    ]
    return sorted(simulated, key=lambda candidate: candidate.total_us)


def best(
    model: Model,
    cluster: Cluster,
    sequence: int,
    candidates: Iterable[Strategy],
    *,
    batch: int = 1,
) -> Candidate:
    """The fastest candidate.

    Raises:
        ValueError: there is none.
    """
    ranked = rank_strategies(model, cluster, sequence, candidates, batch=batch)
    if not ranked:
        raise ValueError(
            f"no mesh of {cluster.num_machines} x {cluster.gpus_per_machine} ranks fits "
            f"{model.num_heads} heads of {model.name}"
        )
    return ranked[0]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
