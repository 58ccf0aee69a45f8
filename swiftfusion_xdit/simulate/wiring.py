"""Which ranks a simulation runs, and which put each wait of theirs is served by.

Builders speak in offsets on the mesh: moving all coordinates by the same amount maps the program
of one rank onto another's. Where rows and heads are even too, and the move keeps machines, all
ranks do the same at the same time. Then one rank stands for all: what it waits for from a peer is
what it puts itself, moved by that peer's coordinates, and its share of a link is what the others'
equal use leaves. So a cluster of any size costs one rank's simulation.

This is exact where programs are images of each other step by step. Builders list the ranks of a
machine in absolute order in a few places (which of several blocks is waited for or handed on
first), so inside a machine two programs may differ in the order of neighbouring steps: the
simulation then gives every rank the order of rank 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule import build, build_program
from swiftfusion_xdit.schedule.steps import Block, Program, Put, Wait
from swiftfusion_xdit.simulate.sizes import BlockSizes
from swiftfusion_xdit.topology import Link, Topology

Message = tuple[int, int, Block]  # (from rank, to rank, block)


@dataclass(frozen=True)
class Wiring:
    """The programs that are simulated; ``symmetric``: rank 0 alone, for all."""

    mesh: Mesh
    groups_per_rank: int
    programs: tuple[Program, ...]
    symmetric: bool

    def message(self, src: int, dst: int, block: Block) -> Message:
        """A put from ``src``, or the put of a simulated rank that stands for it."""
        if not self.symmetric or src == 0:
            return src, dst, block
        mesh, by = self.mesh, self.mesh.coordinates(src)

        def moved(rank: int) -> int:
            at = mesh.coordinates(rank)
            return mesh.rank(at.torus - by.torus, at.ulysses - by.ulysses, at.ring - by.ring)

        coarse, group = divmod(block.heads, self.groups_per_rank)
        t, u = divmod(coarse, mesh.ulysses)
        t, u = (t - by.torus) % mesh.torus, (u - by.ulysses) % mesh.ulysses
        heads = (t * mesh.ulysses + u) * self.groups_per_rank + group
        return 0, moved(dst), Block(block.tensor, moved(block.chunk), heads)

    def most_peers_inside(self, topology: Topology) -> int:
        """To how many others of its machine a rank puts, of the rank with the most."""
        return max(
            len(
                {
                    step.peer
                    for step in program.steps
                    if isinstance(step, Put)
                    and topology.link(program.rank, step.peer) is Link.SAME_MACHINE
                }
            )
            for program in self.programs
        )

    def standing_for(self, rank: int) -> int:
        """The simulated rank that does what ``rank`` does."""
        return 0 if self.symmetric else rank


def wire(name: str, sizes: BlockSizes, topology: Topology, *, symmetric: bool | None) -> Wiring:
    """The programs of schedule ``name`` to simulate.

    Args:
        symmetric: one rank for all, all ranks, or (None) one where that is possible.

    Raises:
        ValueError: one rank was asked for and cannot stand for all.
    """
    mesh, groups = sizes.mesh, sizes.groups_per_rank
    if symmetric is not False:
        alone = Wiring(mesh, groups, (build_program(name, mesh, 0, groups_per_rank=groups),), True)
        why_not = _asymmetry(alone, sizes, topology)
        if not why_not:
            return alone
        if symmetric:
            raise ValueError(f"one rank cannot stand for all of {mesh}: {why_not}")
    schedule = build(name, mesh, groups_per_rank=groups)
    return Wiring(mesh, groups, schedule.programs, False)


def _asymmetry(wiring: Wiring, sizes: BlockSizes, topology: Topology) -> str:
    """Why one rank cannot stand for all, or nothing."""
    mesh, (program,) = sizes.mesh, wiring.programs
    if not sizes.is_even:
        return "rows or heads are not even"
    puts = {(0, step.peer, step.block) for step in program.steps if isinstance(step, Put)}
    waits = (step for step in program.steps if isinstance(step, Wait))
    if any(wiring.message(step.peer, 0, step.block) not in puts for step in waits):
        return "programs are not images of each other"
    for peer in {peer for _, peer, _ in puts}:
        offset, link = mesh.coordinates(peer), topology.link(0, peer)
        for rank in range(mesh.size):
            at = mesh.coordinates(rank)
            image = mesh.rank(
                at.torus + offset.torus, at.ulysses + offset.ulysses, at.ring + offset.ring
            )
            if topology.link(rank, image) != link:
                return "machines lie differently around different ranks"
    return ""
