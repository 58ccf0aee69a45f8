"""The shape of a sequence-parallel group and who attends what.

A group of ``torus * ulysses * ring`` ranks. Rank ``p = (t * ring + r) * ulysses + u`` enters with
chunk ``p`` of the sequence, all heads, and leaves with the same rows of the output. In between it
attends head group ``t * ulysses + u`` for the query rows brought by the ranks that share its
``r``, with the keys and values of every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from swiftfusion_xdit.topology import Topology

AXES = ("torus", "ulysses", "ring")


@dataclass(frozen=True)
class Coordinates:
    """A rank's position on the three axes."""

    torus: int
    ulysses: int
    ring: int


@dataclass(frozen=True)
class Mesh:
    """Degrees of the three axes: torus crosses machines, ulysses and ring stay inside one.

    Raises:
        ValueError: a degree is not a positive integer.
    """

    torus: int = 1
    ulysses: int = 1
    ring: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            degree = getattr(self, axis)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise ValueError(f"mesh {axis} must be a positive integer, got {degree!r}")

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read ``torus=2,ulysses=1,ring=4``; an axis left out has degree 1.

        Raises:
            ValueError: an unknown or repeated axis, or a degree that is no positive integer.
        """
        degrees: dict[str, int] = {}
        for part in text.split(","):
            axis, equals, degree = (piece.strip() for piece in part.partition("="))
            if axis not in AXES or not equals or axis in degrees or not degree.isdecimal():
                raise ValueError(
                    "mesh must look like torus=T,ulysses=U,ring=R with each axis at most once, "
                    f"got {text!r}"
                )
            degrees[axis] = int(degree)
        return cls(**degrees)

    @classmethod
    def of(cls, value: Mesh | str | Mapping[str, int]) -> Mesh:
        """A mesh from a mesh, its text form, or a mapping of axis to degree."""
        if isinstance(value, Mesh):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if unknown := set(value) - set(AXES):
            raise ValueError(f"mesh axes must be among {AXES}, got {sorted(unknown)}")
        return cls(**value)

    def as_dict(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    def __str__(self) -> str:
        return ",".join(f"{axis}={degree}" for axis, degree in self.as_dict().items())

    @property
    def size(self) -> int:
        return self.torus * self.ulysses * self.ring

    @property
    def num_head_groups(self) -> int:
        return self.torus * self.ulysses

    def require(self, *, num_ranks: int, num_heads: int | None = None) -> None:
        """Check that the mesh fits a group, and the heads of a model when they are known.

        Raises:
            ValueError: the product is not the group's size, or a head group would be empty.
        """
        t, u, r = self.torus, self.ulysses, self.ring
        if self.size != num_ranks:
            raise ValueError(
                f"torus({t}) * ulysses({u}) * ring({r}) = {self.size} != sp group size {num_ranks}"
            )
        if num_heads is not None and num_heads < self.num_head_groups:
            raise ValueError(
                f"torus({t}) * ulysses({u}) = {self.num_head_groups} head groups need at least as "
                f"many heads, got {num_heads} heads"
            )

    def rank(self, torus: int, ulysses: int, ring: int) -> int:
        """The rank at (``torus``, ``ulysses``, ``ring``), each taken modulo its degree."""
        t, u, r = torus % self.torus, ulysses % self.ulysses, ring % self.ring
        return (t * self.ring + r) * self.ulysses + u

    @cached_property
    def _coordinates(self) -> tuple[Coordinates, ...]:
        return tuple(
            Coordinates(torus=t, ulysses=u, ring=r)
            for t in range(self.torus)
            for r in range(self.ring)
            for u in range(self.ulysses)
        )

    def coordinates(self, rank: int) -> Coordinates:
        return self._coordinates[rank]

    def head_group(self, rank: int) -> int:
        """The head group that ``rank`` attends."""
        at = self.coordinates(rank)
        return at.torus * self.ulysses + at.ulysses

    def query_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks whose queries ``rank`` attends: those that share its place on the ring."""
        r = self.coordinates(rank).ring
        return tuple(self.rank(t, u, r) for t in range(self.torus) for u in range(self.ulysses))

    def ulysses_groups(self) -> tuple[tuple[int, ...], ...]:
        """Rank lists that exchange heads for rows: equal ring coordinate, by head group."""
        return tuple(self.query_ranks(self.rank(0, 0, r)) for r in range(self.ring))

    def ring_groups(self) -> tuple[tuple[int, ...], ...]:
        """Rank lists that pass keys and values round: equal head group, by ring coordinate."""
        return tuple(
            tuple(self.rank(t, u, r) for r in range(self.ring))
            for t in range(self.torus)
            for u in range(self.ulysses)
        )


def paper_mesh(topology: Topology, num_heads: int) -> Mesh:
    """Ulysses across machines, Ring inside: SwiftFusion's rule ``P_u = gcd(N * M, H)``.

    The rule presumes that N divides ``P_u``. Where it does not, ``P_u`` ranks still exchange
    heads and the ring, ``N * M / P_u`` consecutive ranks, reaches over several machines.

    Args:
        topology: N machines of M ranks; uneven placements count as one machine.
        num_heads: H, query heads.

    Source: SwiftFusion (arXiv 2601.20273), topology-aware sequence parallelism.
    """
    num_ranks = topology.num_ranks
    num_machines = topology.num_machines if topology.is_even else 1
    num_head_groups = math.gcd(num_ranks, num_heads)
    ring = num_ranks // num_head_groups
    if num_head_groups % num_machines:
        return Mesh(torus=num_head_groups, ulysses=1, ring=ring)
    return Mesh(torus=num_machines, ulysses=num_head_groups // num_machines, ring=ring)


def torus_mesh(topology: Topology, num_heads: int) -> Mesh:
    """The paper's mesh, kept on the machines' boundaries where uneven heads allow it.

    Torus Attention splits heads unevenly, so a head count that N does not divide need not
    stretch the ring over machines: the torus axis then takes all N machines and Ulysses the
    largest divisor of M that leaves every head group a head.
    """
    mesh = paper_mesh(topology, num_heads)
    num_machines = topology.num_machines if topology.is_even else 1
    if mesh.torus == num_machines or num_machines > num_heads:
        return mesh
    ranks_per_machine = topology.num_ranks // num_machines
    ulysses = max(
        degree
        for degree in range(1, ranks_per_machine + 1)
        if ranks_per_machine % degree == 0 and num_machines * degree <= num_heads
    )
    return Mesh(torus=num_machines, ulysses=ulysses, ring=ranks_per_machine // ulysses)


def split_counts(total: int, num_parts: int) -> list[int]:
    """Sizes of consecutive parts that differ by at most one, the larger ones first."""
    size, larger = divmod(total, num_parts)
    return [size + (i < larger) for i in range(num_parts)]


def head_group_sizes(num_heads: int, num_groups: int, *, edge_heads: int = 0) -> list[int]:
    """Heads of each group that one rank works through.

    Even, the larger ones first. With ``edge_heads`` the first and the last of three or more groups
    have that many, if the others then keep at least as many each: nothing hides the way in of the
    first group nor the way home of the last.
    """
    inner = num_heads - 2 * edge_heads
    if edge_heads == 0 or num_groups < 3 or inner < edge_heads * (num_groups - 2):
        return split_counts(num_heads, num_groups)
    return [edge_heads, *split_counts(inner, num_groups - 2), edge_heads]


def whole_sequence_mesh(topology: Topology) -> Mesh:
    """A mesh without a ring: every rank attends all rows, with heads of its own."""
    num_ranks = topology.num_ranks
    num_machines = topology.num_machines if topology.is_even else 1
    return Mesh(torus=num_machines, ulysses=num_ranks // num_machines)


def usp_mesh(topology: Topology, num_heads: int) -> Mesh:
    """USP's layout: Ulysses inside a machine (as far as the heads divide), Ring across.

    ``torus`` is 1 and the ring axis strides over the machines, as in xDiT.
    """
    num_ranks = topology.num_ranks
    ranks_per_machine = num_ranks // topology.num_machines if topology.is_even else num_ranks
    ulysses = math.gcd(ranks_per_machine, num_heads)
    return Mesh(torus=1, ulysses=ulysses, ring=num_ranks // ulysses)
