"""Degrees that the caller fixes are kept, and those that no mesh has are refused by name."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.planner import plan
from swiftfusion_xdit.simulate.sizes import LayerShape

CLUSTER = preset("p5", num_machines=2, gpus_per_machine=4)
SHAPE = LayerShape.even(8, sequence=4096, num_heads=6, head_dim=128)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ("ring=4", {"ring": 4}),
        ({"ulysses": 2}, {"ulysses": 2}),
        ("torus=2,ring=2", {"torus": 2, "ring": 2}),
        (Mesh(torus=1, ulysses=4, ring=2), {"torus": 1, "ulysses": 4, "ring": 2}),
        ("torus=1", {"torus": 1}),
    ],
)
def test_fixed_degrees_are_kept(degrees: object, expected: dict[str, int]) -> None:
    mesh = plan(CLUSTER, SHAPE, degrees).mesh  # type: ignore[arg-type]
    assert {axis: mesh.as_dict()[axis] for axis in expected} == expected
    assert mesh.size == 8


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ("ring=3", r"ring\(3\) = 3 does not divide the 8 GPUs"),
        ("torus=2,ulysses=2,ring=1", r"torus\(2\) \* ulysses\(2\) \* ring\(1\) = 4 != the 8 GPUs"),
        ("torus=2,ulysses=4", "8 head groups need at least as many heads, got 6"),
        ("rows=2", "torus=T,ulysses=U,ring=R"),
        ({"rows": 2}, "mesh axes must be among"),
        ({"ring": -1}, "must be a positive integer, got -1"),
    ],
)
def test_impossible_degrees_are_refused(degrees: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(CLUSTER, SHAPE, degrees)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "best"}, "policy must be of fastest, paper, got 'best'"),
        ({"strategies": ("ring",)}, "strategies must be of usp, tas, torus, got 'ring'"),
        ({"strategies": ()}, "strategies must be of"),
        ({"schedules": ("spiral",)}, "schedules must be of torus, .*, fused, got 'spiral'"),
    ],
)
def test_unknown_names_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(CLUSTER, SHAPE, **arguments)


def test_a_shape_of_other_ranks_is_refused() -> None:
    shape = LayerShape.even(4, sequence=4096, num_heads=6, head_dim=128)
    with pytest.raises(ValueError, match=r"4 ranks, cluster p5 has 2 machines \* 4 GPUs = 8"):
        plan(CLUSTER, shape)
