"""One rank may stand for all where all do the same, and only there."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.simulate.hardware import Cluster, Link
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import Transport
from tests.simulate_cases import PLAIN, REAL_GPU, TRANSPORTS, Case, make_cluster

# Where programs differ between ranks (in the order in which they hand on what came in), one rank's
# order is taken for all: that is off by this much at most.
WITHIN = 0.01


def _shape(mesh: Mesh, rows: int = 1024) -> LayerShape:
    heads = 6 * mesh.num_head_groups
    return LayerShape.even(mesh.size, sequence=rows * mesh.size, num_heads=heads, head_dim=64)


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
@pytest.mark.parametrize("schedule", ["torus", "folded", "pipelined"])
@pytest.mark.parametrize(
    "mesh", [Mesh(2), Mesh(4), Mesh(1, 2, 1), Mesh(1, 1, 4), Mesh(3, 1, 2)], ids=str
)
def test_exact_where_programs_are_images(mesh: Mesh, schedule: str, transport: Transport) -> None:
    times = [
        Case(schedule, mesh, _shape(mesh), transport, symmetric=symmetric).simulate().total_us
        for symmetric in (True, False)
    ]
    assert times[0] == pytest.approx(times[1], rel=1e-6), f"{schedule} {mesh} {transport.name}"


@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda transport: transport.name)
@pytest.mark.parametrize("schedule", ["usp", "torus", "folded", "pipelined"])
@pytest.mark.parametrize("mesh", [Mesh(4, 2, 4), Mesh(2, 4, 2), Mesh(3, 8, 1), Mesh(2, 2, 2)])
def test_close_where_orders_inside_a_machine_differ(
    mesh: Mesh, schedule: str, transport: Transport
) -> None:
    if schedule == "usp" and not transport.two_sided:
        pytest.skip("a baseline that runs two-sided: its puts in turn cross machines unevenly")
    times = [
        Case(schedule, mesh, _shape(mesh), transport, symmetric=symmetric).simulate().total_us
        for symmetric in (True, False)
    ]
    assert times[0] == pytest.approx(times[1], rel=WITHIN), f"{schedule} {mesh} {transport.name}"


@pytest.mark.parametrize("uneven", ["rows", "heads", "machines"])
def test_refused_where_ranks_differ(uneven: str) -> None:
    mesh, shape = Mesh(2, 2, 1), _shape(Mesh(2, 2, 1))
    cluster = make_cluster(mesh)
    if uneven == "rows":
        lengths = (1024, 1024, 1024, 1000)
        shape = LayerShape(1, lengths, lengths, 24, 24, 64)
    elif uneven == "heads":
        shape = LayerShape.even(4, sequence=4096, num_heads=25, head_dim=64)
    else:  # two ranks of a ring of four on each machine: some hops cross and some do not
        mesh = Mesh(1, 1, 4)
        cluster = Cluster("pairs", REAL_GPU, 2, 2, Link(250.0, 5.0), Link(50.0, 20.0))
    assert not Case("torus", mesh, shape, PLAIN).simulate(cluster).symmetric
    with pytest.raises(ValueError, match="cannot stand for all"):
        Case("torus", mesh, shape, PLAIN, symmetric=True).simulate(cluster)


def test_64_machines_of_8_are_simulated_by_one_rank() -> None:
    mesh = Mesh(torus=64, ring=8)
    shape = LayerShape.even(512, sequence=512 * 640, num_heads=64, head_dim=128)
    layer = Case("torus", mesh, shape, PLAIN).simulate()
    assert layer.symmetric
    assert layer.num_ranks == 512
    assert layer.total_us > layer.floor_us
    expected = 4 * 63 / 64 * 640 * 64 * 128 * 2
    assert layer.bytes_across == pytest.approx(expected)
