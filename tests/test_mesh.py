"""A mesh numbers ranks, names the ranks that work together, and rejects what does not fit."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.mesh import Mesh, paper_mesh, torus_mesh, usp_mesh
from swiftfusion_xdit.topology import Topology
from tests.meshes import meshes_up_to


@pytest.mark.parametrize("mesh", meshes_up_to(12), ids=str)
def test_coordinates_and_ranks_are_inverse(mesh: Mesh) -> None:
    for rank in range(mesh.size):
        at = mesh.coordinates(rank)
        assert mesh.rank(at.torus, at.ulysses, at.ring) == rank
        assert rank in mesh.query_ranks(rank)


@pytest.mark.parametrize("mesh", meshes_up_to(12), ids=str)
def test_groups_partition_the_ranks(mesh: Mesh) -> None:
    for groups, size in (
        (mesh.ulysses_groups(), mesh.num_head_groups),
        (mesh.ring_groups(), mesh.ring),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
        assert {len(group) for group in groups} == {size}


def test_ring_and_ulysses_stay_inside_a_machine() -> None:
    mesh, topology = Mesh(torus=2, ulysses=2, ring=2), Topology.split(8, 2)
    for group in mesh.ring_groups():
        assert len({topology.machine_of[rank] for rank in group}) == 1
    assert mesh.ulysses_groups()[0] == (0, 1, 4, 5)


@pytest.mark.parametrize(
    ("machines", "ranks", "heads", "expected"),
    [
        (4, 32, 24, Mesh(4, 2, 4)),  # the paper's examples
        (3, 24, 24, Mesh(3, 8, 1)),
        (2, 4, 6, Mesh(2, 1, 2)),
        (4, 8, 6, Mesh(2, 1, 4)),  # P_u = 2 cannot span 4 machines: the ring does
        (1, 8, 24, Mesh(1, 8, 1)),
        (2, 2, 7, Mesh(1, 1, 2)),
    ],
)
def test_paper_mesh(machines: int, ranks: int, heads: int, expected: Mesh) -> None:
    assert paper_mesh(Topology.split(ranks, machines), heads) == expected


@pytest.mark.parametrize(
    ("machines", "ranks", "heads", "expected"),
    [
        (4, 32, 24, Mesh(4, 2, 4)),
        (4, 8, 6, Mesh(4, 1, 2)),  # uneven heads keep the ring inside
        (2, 2, 7, Mesh(2, 1, 1)),
        (4, 8, 3, Mesh(1, 1, 8)),  # fewer heads than machines
    ],
)
def test_torus_mesh_keeps_the_ring_inside(
    machines: int, ranks: int, heads: int, expected: Mesh
) -> None:
    assert torus_mesh(Topology.split(ranks, machines), heads) == expected


def test_uneven_placement_counts_as_one_machine() -> None:
    assert torus_mesh(Topology((0, 0, 0, 1)), 8) == Mesh(1, 4, 1)


def test_usp_mesh_puts_the_ring_across() -> None:
    mesh = usp_mesh(Topology.split(8, 4), 6)
    assert mesh == Mesh(1, 2, 4)
    assert mesh.ring_groups()[0] == (0, 2, 4, 6)


def test_parse_reads_what_str_writes() -> None:
    for mesh in meshes_up_to(8):
        assert Mesh.parse(str(mesh)) == mesh
    assert Mesh.of({"ring": 3}) == Mesh.parse(" ring = 3 ") == Mesh(ring=3)


@pytest.mark.parametrize("text", ["", "torus", "torus=0", "torus=-1", "torus=2,torus=2", "x=2"])
def test_parse_rejects(text: str) -> None:
    with pytest.raises(ValueError, match="mesh"):
        Mesh.parse(text)


def test_errors_show_the_equation() -> None:
    with pytest.raises(
        ValueError, match=r"torus\(2\) \* ulysses\(3\) \* ring\(2\) = 12 != sp group size 8"
    ):
        Mesh(2, 3, 2).require(num_ranks=8)
    with pytest.raises(ValueError, match=r"torus\(2\) \* ulysses\(4\) = 8 head groups .* 6 heads"):
        Mesh(2, 4, 1).require(num_ranks=8, num_heads=6)
    with pytest.raises(ValueError, match="mesh ring must be a positive integer, got 0"):
        Mesh(ring=0)
    with pytest.raises(ValueError, match=r"got \['rings'\]"):
        Mesh.of({"rings": 2})
