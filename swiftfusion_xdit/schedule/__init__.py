"""Schedules as values: one builder per strategy, and the checker that proves them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.check import ScheduleError, check
from swiftfusion_xdit.schedule.classic import ring, ulysses, usp
from swiftfusion_xdit.schedule.folded import folded
from swiftfusion_xdit.schedule.fused import fused
from swiftfusion_xdit.schedule.pipelined import pipelined, whole_sequence
from swiftfusion_xdit.schedule.steps import Program, Schedule
from swiftfusion_xdit.schedule.torus import torus

__all__ = ["BUILDERS", "GROUPED", "Schedule", "ScheduleError", "build", "build_program", "check"]

BUILDERS: dict[str, Callable[..., Program]] = {
    "ulysses": ulysses,
    "ring": ring,
    "usp": usp,
    "torus": torus,
    "folded": folded,
    "pipelined": pipelined,
    "fused": fused,
    "whole_sequence": whole_sequence,
}
# They work through several head groups in turn.
GROUPED = ("torus", "pipelined", "fused", "whole_sequence")


@lru_cache(maxsize=64)
def build(name: str, mesh: Mesh, *, groups_per_rank: int = 1) -> Schedule:
    """Build every rank's program; arguments and errors as for ``build_program``."""
    programs = tuple(
        build_program(name, mesh, rank, groups_per_rank=groups_per_rank)
        for rank in range(mesh.size)
    )
    return Schedule(name, mesh, groups_per_rank, programs)


def build_program(name: str, mesh: Mesh, rank: int, *, groups_per_rank: int = 1) -> Program:
    """Build one rank's program.

    Args:
        name: a key of ``BUILDERS``.
        groups_per_rank: head groups that each rank works through in turn; more than one only with
            ``pipelined``, ``fused``, and ``torus`` on a mesh with torus=1.

    Raises:
        ValueError: an unknown name, a mesh the builder does not serve, or a number of groups
            it cannot use.
    """
    builder = BUILDERS.get(name)
    if builder is None:
        raise ValueError(f"schedule must be one of {sorted(BUILDERS)}, got {name!r}")
    if groups_per_rank < 1 or (groups_per_rank > 1 and name not in GROUPED):
        raise ValueError(
            "groups_per_rank must be 1, or more with schedules 'torus', 'pipelined' and 'fused', "
            f"got {groups_per_rank} with {name!r}"
        )
    options = {"groups_per_rank": groups_per_rank} if name in GROUPED else {}
    return builder(mesh, rank, **options)
