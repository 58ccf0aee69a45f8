"""With free communication a layer takes the floor: its local attention and nothing else."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import Transport
from tests.simulate_cases import IDEAL_GPU, MESHES, TRANSPORTS, Case, make_cluster


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
@pytest.mark.parametrize("schedule", ["usp", "torus", "folded", "pipelined"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_free_links_leave_the_floor(
    mesh: Mesh, schedule: str, transport: Transport, symmetric: bool
) -> None:
    # Four heads a group and whole tiles: every call of every schedule is whole waves.
    heads = 8 * mesh.num_head_groups
    shape = LayerShape.even(mesh.size, sequence=256 * mesh.size, num_heads=heads, head_dim=128)
    groups = 2 if schedule == "pipelined" else 1
    case = Case(schedule, mesh, shape, transport, groups, symmetric)
    layer = case.simulate(make_cluster(mesh, gpu=IDEAL_GPU), free_links=True)
    floor = shape.flops / mesh.size / (100.0 * 1e6)
    assert layer.floor_us == pytest.approx(floor), case
    assert layer.total_us == pytest.approx(floor, rel=1e-6), case
