"""Meshes and shapes that several tests go through."""

from __future__ import annotations

from swiftfusion_xdit.mesh import Mesh


def meshes_of(num_ranks: int) -> list[Mesh]:
    """Every mesh of exactly ``num_ranks`` ranks."""
    divisors = [d for d in range(1, num_ranks + 1) if num_ranks % d == 0]
    return [
        Mesh(t, u, num_ranks // (t * u))
        for t in divisors
        for u in divisors
        if num_ranks % (t * u) == 0
    ]


def meshes_up_to(num_ranks: int) -> list[Mesh]:
    return [mesh for size in range(1, num_ranks + 1) for mesh in meshes_of(size)]
