"""With free compute a layer takes its bytes over the bandwidth."""

from __future__ import annotations

import dataclasses

import pytest

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.simulate.cost import Costs
from swiftfusion_xdit.simulate.sizes import LayerShape
from tests.simulate_cases import PLAIN, REAL_GPU, Case, make_cluster

FREE = Costs(REAL_GPU, free_compute=True)


def _shape(mesh: Mesh) -> LayerShape:
    return LayerShape.even(mesh.size, sequence=960 * mesh.size, num_heads=12, head_dim=64)


@pytest.mark.parametrize("schedule", ["usp", "torus", "folded", "pipelined"])
@pytest.mark.parametrize("machines", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_across_machines(schedule: str, machines: int, symmetric: bool) -> None:
    mesh = Mesh(torus=machines)
    case = Case(schedule, mesh, _shape(mesh), PLAIN, symmetric=symmetric)
    layer = case.simulate(make_cluster(mesh, latency_us=0.0, per_gpu=None), costs=FREE)
    # Q, K, V and O of a rank's rows, of which one part in N stays (PAPER: 4 (N-1)/N^2 B L H D).
    leaving = 4 * (machines - 1) / machines * 960 * 12 * 64 * 2
    assert layer.bytes_across == pytest.approx(leaving), case
    assert layer.total_us == pytest.approx(leaving / 50e3), case


@pytest.mark.parametrize("mesh", [Mesh(ulysses=2), Mesh(ulysses=4), Mesh(ring=2), Mesh(ring=3)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inside_a_machine(mesh: Mesh, symmetric: bool) -> None:
    case = Case("usp", mesh, _shape(mesh), PLAIN, symmetric=symmetric)
    layer = case.simulate(make_cluster(mesh, latency_us=0.0), costs=FREE)
    own, peers = 960 * 12 * 64 * 2, mesh.size - 1
    leaving = 4 * peers * own / mesh.ulysses if mesh.ulysses > 1 else 2 * peers * own
    assert layer.total_us == pytest.approx(leaving / 250e3), case


@pytest.mark.parametrize("schedule", ["usp", "torus", "folded", "pipelined"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_rank_is_written_to_by_all_at_once(schedule: str, symmetric: bool) -> None:
    mesh = Mesh(ulysses=4)
    case = Case(schedule, mesh, _shape(mesh), PLAIN, symmetric=symmetric)
    layer = case.simulate(make_cluster(mesh, latency_us=0.0), costs=FREE)
    leaving = 4 * 3 / 4 * 960 * 12 * 64 * 2
    assert layer.total_us == pytest.approx(leaving / 250e3), case


@pytest.mark.parametrize("symmetric", [True, False])
def test_gpus_of_a_machine_share_its_way_out(symmetric: bool) -> None:
    mesh = Mesh(torus=2, ulysses=3)
    case = Case("pipelined", mesh, _shape(mesh), PLAIN, symmetric=symmetric)
    fast_inside = make_cluster(mesh, latency_us=0.0, per_gpu=None)
    fast_inside = dataclasses.replace(
        fast_inside, inside=dataclasses.replace(fast_inside.inside, gb_per_s=1e9)
    )
    layer = case.simulate(fast_inside, costs=FREE)
    leaving = 4 * 3 / 6 * 960 * 12 * 64 * 2  # a GPU; three of them share 50 GB/s
    assert layer.total_us == pytest.approx(3 * leaving / 50e3, rel=1e-4), case


def test_message_size_decides_the_bandwidth_that_is_reached() -> None:
    mesh = Mesh(ulysses=2)
    case = Case("usp", mesh, _shape(mesh), PLAIN)
    layer = case.simulate(make_cluster(mesh, latency_us=7.0), costs=FREE)
    block = 960 * 6 * 64 * 2
    assert layer.total_us == pytest.approx(4 * (7.0 + block / 250e3)), case
