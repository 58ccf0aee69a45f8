"""What the planner chooses from: strategies, their meshes, and schedules of a layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from swiftfusion_xdit.mesh import AXES, Mesh, paper_mesh
from swiftfusion_xdit.schedule.fused import fused_groups, suits_kernel_puts
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.topology import Topology

STRATEGIES = ("usp", "tas", "torus")
SCHEDULES = ("torus", "folded", "pipelined")
KNOWN_SCHEDULES = (*SCHEDULES, "fused")
FUSED_GPUS = ("h100", "h200")  # whose attention kernel can wait for its peers
PIPELINED_GROUPS = (1, 2, 3, 4, 6)
RING_GROUPS = (1, 4)  # of `torus` on a ring between machines, whose links may be slow
EDGED_GROUPS = (3, 4)  # with few heads in the first and the last
EDGE_HEADS = (1, 2, 3)


@dataclass(frozen=True)
class Candidate:
    """One way to run an attention layer; ``schedule`` is a key of ``schedule.BUILDERS``.

    ``whole_rounds`` says how transfers whose receivers take part go in batches, see
    ``schedule/rounds.py``.
    """

    strategy: str
    mesh: Mesh
    schedule: str
    groups_per_rank: int = 1
    edge_heads: int = 0
    whole_rounds: bool = False

    def __str__(self) -> str:
        text = f"{self.strategy} {self.mesh}"
        if self.strategy != "torus":
            return text
        groups = f" in {self.groups_per_rank} head groups" if self.groups_per_rank > 1 else ""
        edges = f" ({self.edge_heads} heads in the first and last)" if self.edge_heads else ""
        rounds = ", in whole rounds" if self.whole_rounds else ""
        return f"{text} {self.schedule}{groups}{edges}{rounds}"


def parse_degrees(degrees: Mesh | Mapping[str, int] | str | None) -> dict[str, int]:
    """The axes that are fixed, from a mesh, a mapping or ``torus=4,ring=2``.

    Raises:
        ValueError: an unknown axis, or a degree that is no positive integer.
    """
    if degrees is None:
        return {}
    if isinstance(degrees, Mesh):
        return degrees.as_dict()
    if isinstance(degrees, str):
        named = Mesh.parse(degrees).as_dict()
        return {axis: named[axis] for axis in AXES if axis in degrees}
    return {axis: getattr(Mesh.of(degrees), axis) for axis in degrees}


def check_degrees(degrees: Mapping[str, int], *, num_ranks: int, num_heads: int) -> None:
    """Check that some mesh has these degrees.

    Raises:
        ValueError: they do not divide the group, are not all of it, or leave head groups empty.
    """
    product = " * ".join(f"{axis}({degree})" for axis, degree in degrees.items())
    size = 1
    for degree in degrees.values():
        size *= degree
    complete = len(degrees) == len(AXES)
    if (complete and size != num_ranks) or num_ranks % size:
        relation = "!=" if complete else "does not divide"
        raise ValueError(f"degrees: {product} = {size} {relation} the {num_ranks} GPUs")
    num_groups = degrees.get("torus", 1) * degrees.get("ulysses", 1)
    if num_groups > num_heads:
        raise ValueError(
            f"degrees: torus * ulysses = {num_groups} head groups need at least as many heads, "
            f"got {num_heads} heads"
        )


def meshes(num_ranks: int) -> Iterator[Mesh]:
    """Every mesh of a group: torus outermost, the largest Ulysses first."""
    for torus in _divisors(num_ranks):
        rest = num_ranks // torus
        for ulysses in reversed(_divisors(rest)):
            yield Mesh(torus=torus, ulysses=ulysses, ring=rest // ulysses)


def sort_meshes(
    strategy: str, topology: Topology, num_heads: int, degrees: Mapping[str, int]
) -> tuple[list[Mesh], list[tuple[Mesh, str]]]:
    """The meshes on which a strategy can run well, and the others with the reason against each.

    Degrees that the caller fixed are kept, also where they make no good mesh.
    """
    good: list[Mesh] = []
    bad: list[tuple[Mesh, str]] = []
    paper = paper_mesh(topology, num_heads)
    for mesh in meshes(topology.num_ranks):
        if any(getattr(mesh, axis) != degree for axis, degree in degrees.items()):
            continue
        reason = _impossible(strategy, mesh, num_heads)
        if not reason and (strategy, mesh) != ("tas", paper):
            reason = _unwise(strategy, mesh, topology.num_machines, degrees)
        if reason:
            bad.append((mesh, reason))
        else:
            good.append(mesh)
    if not good and strategy == "torus":
        # More machines than heads, say: any mesh is better than none.
        good = [mesh for mesh, _ in bad if mesh.num_head_groups <= num_heads]
        bad = [(mesh, reason) for mesh, reason in bad if mesh not in good]
    return good, bad


def _impossible(strategy: str, mesh: Mesh, num_heads: int) -> str:
    """Why a strategy cannot run on a mesh at all, or nothing."""
    groups = mesh.num_head_groups
    if strategy == "usp" and mesh.torus > 1:
        return "usp has no torus axis"
    if groups > num_heads:
        return f"{groups} head groups need at least as many heads, got {num_heads} heads"
    if strategy != "torus" and num_heads % groups:
        return f"xDiT's collectives need {groups} head groups to divide {num_heads} heads"
    return ""


def _unwise(strategy: str, mesh: Mesh, num_machines: int, degrees: Mapping[str, int]) -> str:
    """Why a strategy would run badly on a mesh, or nothing."""
    if strategy == "usp" or num_machines == 1 or "torus" in degrees:
        return ""
    if strategy == "torus" and mesh.ring == mesh.size == 2:
        return ""  # keys cross once, whole: as many rows as with torus=2, and none go home
    if mesh.torus < num_machines:
        return f"torus={mesh.torus} on {num_machines} machines: keys would cross more than once"
    if mesh.torus > num_machines:
        return f"torus={mesh.torus} on {num_machines} machines: it would cut machines in parts"
    return ""


def schedules_on(
    strategy: str, mesh: Mesh, shape: LayerShape, num_machines: int, *, schedules: tuple[str, ...]
) -> Iterator[Candidate]:
    """The schedules of a strategy on a mesh."""
    if strategy != "torus":
        yield Candidate(strategy, mesh, "usp")
        return
    for name in schedules:
        if name == "folded" and mesh.torus == 1:
            continue  # the same steps as `torus`
        if name == "fused":
            if mesh.num_head_groups == 1 < mesh.size:
                groups, _ = fused_groups(
                    shape.num_heads, shape.num_kv_heads, put_by_kernel=suits_kernel_puts(shape)
                )
                yield Candidate(strategy, mesh, name, groups)
            continue
        if name != "pipelined":
            is_grouped = name == "torus" and mesh.num_head_groups == 1 < num_machines
            for groups in RING_GROUPS if is_grouped else (1,):
                if groups <= shape.num_kv_heads:
                    yield Candidate(strategy, mesh, name, groups)
            continue
        heads = shape.num_heads // mesh.num_head_groups
        for groups in PIPELINED_GROUPS:
            if groups <= heads:
                yield Candidate(strategy, mesh, name, groups)
        for groups, edge in itertools.product(EDGED_GROUPS, EDGE_HEADS):
            if edge * groups <= heads:
                yield Candidate(strategy, mesh, name, groups, edge)


def schedules_of(cluster: Cluster) -> tuple[str, ...]:
    """What `torus` can run on a cluster with the best attention kernel of its GPUs."""
    can_fuse = cluster.num_machines == 1 and cluster.gpu.name in FUSED_GPUS
    return KNOWN_SCHEDULES if can_fuse else SCHEDULES


def fits(cluster: Cluster, shape: LayerShape) -> None:
    """Check that a shape is one of this cluster's ranks.

    Raises:
        ValueError: the shape has other ranks.
    """
    if len(shape.query_lengths) != cluster.num_ranks:
        raise ValueError(
            f"shape has {len(shape.query_lengths)} ranks, cluster {cluster.name} has "
            f"{cluster.num_machines} machines * {cluster.gpus_per_machine} GPUs = "
            f"{cluster.num_ranks}"
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
