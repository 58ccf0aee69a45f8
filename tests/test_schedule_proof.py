"""The checker proves every builder on every mesh."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule import BUILDERS, build, check
from tests.meshes import meshes_of


def schedules_on(mesh: Mesh) -> list[tuple[str, int]]:
    """(builder, head groups a rank) that serve a mesh."""
    chosen = [("usp", 1), ("torus", 1), ("folded", 1), ("pipelined", 1), ("pipelined", 2)]
    if mesh.torus == 1:
        chosen.append(("torus", 2))
    if mesh.ring == 1:
        chosen.append(("ulysses", 1))
    if mesh.num_head_groups == 1:
        chosen += [("ring", 1), ("fused", 1), ("fused", 3)]
    assert {name for name, _ in chosen} <= set(BUILDERS)
    return chosen


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """Schedules are large and free of cycles: looking for some takes a third of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize(
    "num_ranks",
    [*range(1, 33), *(pytest.param(n, marks=pytest.mark.slow) for n in range(33, 65))],
)
def test_proved_on_every_mesh(num_ranks: int) -> None:
    for mesh in meshes_of(num_ranks):
        for name, groups in schedules_on(mesh):
            check(build.__wrapped__(name, mesh, groups_per_rank=groups))


def test_three_head_groups() -> None:
    for mesh in meshes_of(8):
        check(build("pipelined", mesh, groups_per_rank=3))


@pytest.mark.parametrize(
    ("name", "mesh", "groups", "message"),
    [
        ("spiral", Mesh(), 1, "schedule must be one of .*'torus'.* got 'spiral'"),
        ("ulysses", Mesh(1, 2, 2), 1, "ulysses needs a mesh with ring=1"),
        ("ring", Mesh(2, 1, 2), 1, "ring needs a mesh with torus=1 and ulysses=1"),
        ("fused", Mesh(2, 1, 2), 1, "'fused' needs a mesh with torus=1 and ulysses=1"),
        ("folded", Mesh(2), 2, "or more with schedules 'torus', 'pipelined' and 'fused'"),
        ("torus", Mesh(2), 2, "must be 1 with schedule 'torus' on a mesh with torus > 1, got 2 on"),
        ("pipelined", Mesh(2), 0, "groups_per_rank must be 1, or more"),
    ],
)
def test_builders_refuse(name: str, mesh: Mesh, groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, mesh, groups_per_rank=groups)
