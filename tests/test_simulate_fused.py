"""A fused launch in the simulator: its waves wait for the keys of their own heads, no others."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.planner import plan
from swiftfusion_xdit.schedule.fused import fused_groups
from swiftfusion_xdit.simulate.cost import tile_rows, worked_rows
from swiftfusion_xdit.simulate.layer import LayerTime, simulate_layer
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import one_sided

CLUSTER = preset("h200-2")
FLUX_1024 = {"sequence": 4608, "num_heads": 24, "head_dim": 128}
FLUX_2048 = {"sequence": 16896, "num_heads": 24, "head_dim": 128}


def layer(
    sizes: dict, num_ranks: int = 2, *, gb_per_s: float | None = None, **options: object
) -> LayerTime:
    cluster = dataclasses.replace(CLUSTER, gpus_per_machine=num_ranks)
    if gb_per_s is not None:
        inside = dataclasses.replace(cluster.inside, gb_per_s=gb_per_s)
        cluster = dataclasses.replace(cluster, inside=inside)
    shape = LayerShape.even(num_ranks, **sizes)
    puts = one_sided()
    return simulate_layer(
        "fused", Mesh(ring=num_ranks), shape, cluster, inside=puts, across=puts, **options
    )


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_without_communication_it_is_one_attention_call(num_ranks: int, groups: int) -> None:
    found = layer(FLUX_2048, num_ranks, groups_per_rank=groups, free_links=True)
    assert found.total_us == pytest.approx(found.floor_us, rel=1e-6)
    assert found.attention_us == pytest.approx(found.floor_us, rel=1e-6)


def test_the_first_wave_waits_for_its_heads_only() -> None:
    """Of one group it waits for all keys; measured on two H100: 1.35, and 1.30 with two groups."""
    one, two = (layer(FLUX_1024, groups_per_rank=groups) for groups in (1, 2))
    waited_us = one.total_us - one.floor_us - one_sided().layer_us
    put_us = 2 * 2304 * 24 * 128 * 2 / CLUSTER.inside.gb_per_s / 1e3
    first_wave_us = one.floor_us / 4 / 2  # its own keys, of four waves
    assert waited_us == pytest.approx(put_us - first_wave_us, abs=15)
    assert two.total_us < one.total_us


def test_what_does_not_hide_is_paid() -> None:
    slow = layer(FLUX_2048, gb_per_s=10.0, groups_per_rank=4)
    put_us = 2 * 8448 * 24 * 128 * 2 / 10.0 / 1e3
    assert slow.total_us > put_us > slow.floor_us


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_one_rank_stands_for_all(num_ranks: int) -> None:
    one, every = (
        layer(FLUX_2048, num_ranks, groups_per_rank=3, symmetric=symmetric)
        for symmetric in (True, False)
    )
    assert one.symmetric and not every.symmetric
    assert one.total_us == pytest.approx(every.total_us, rel=1e-9)


def test_long_sequences_are_attended_in_few_operations() -> None:
    long = layer({"sequence": 75600, "num_heads": 40, "head_dim": 128}, groups_per_rank=4)
    assert len(long.graph.ops) < 100


def test_the_planner_takes_it_where_the_kernel_exists() -> None:
    shape = LayerShape.even(2, **FLUX_2048)
    assert plan(CLUSTER, shape).schedule == "fused"
    assert plan(preset("p4de"), LayerShape.even(32, **FLUX_2048)).schedule != "fused"
    assert plan(CLUSTER, shape, schedules=("torus", "folded")).schedule == "torus"


@pytest.mark.parametrize(
    ("rows", "head_dim", "tiles"),
    [(2304, 128, 18), (2305, 128, 18.5), (8888, 64, 46 + 1 / 3), (8970, 64, 47)],
)
def test_warp_groups_without_rows_do_not_count(rows: int, head_dim: int, tiles: float) -> None:
    worked = worked_rows(query_rows=rows, head_dim=head_dim, fused=True)
    assert worked / tile_rows(head_dim) == pytest.approx(tiles)


def test_short_puts_to_several_peers_go_by_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on four H200 at FLUX 1024, two head groups: 226 us, and 260 by engines."""
    by_kernel = layer(FLUX_1024, 4, groups_per_rank=2)
    assert by_kernel.total_us == pytest.approx(226, rel=0.05)
    two_ranks, long = layer(FLUX_1024, 2), layer(FLUX_2048, 4)
    # The package has a function of this name.
    monkeypatch.setattr(importlib.import_module(fused_groups.__module__), "MOST_KERNEL_BYTES", 0)
    assert layer(FLUX_1024, 4, groups_per_rank=2).total_us > by_kernel.total_us
    assert layer(FLUX_1024, 2).total_us == two_ranks.total_us  # engines reach one peer sooner
    assert layer(FLUX_2048, 4).total_us == long.total_us


def test_a_kernel_puts_fewer_and_wider_messages() -> None:
    assert fused_groups(24, 24, heads_at_once=14.7) == (4, 4)
    assert fused_groups(24, 24, heads_at_once=14.7, put_by_kernel=True) == (2, 0)
    assert fused_groups(24, 24, heads_at_once=14.7, wanted=3, put_by_kernel=True) == (3, 0)
    assert fused_groups(24, 8, put_by_kernel=True) == (2, 0)
