"""Attention goes in whole waves of tiles; copies and merges by their bytes."""

from __future__ import annotations

import dataclasses

import pytest

from swiftfusion_xdit.simulate.cost import Costs
from swiftfusion_xdit.simulate.hardware import Link
from tests.simulate_cases import REAL_GPU

RATE = REAL_GPU.attention_rate(128) * 1e6  # FLOP a microsecond
COSTS = Costs(dataclasses.replace(REAL_GPU, num_units=10, kernel_us=0.0))


def _attend(rows: int, heads: int = 1, batch: int = 1) -> float:
    return COSTS.attend_us(
        query_rows=rows, key_rows=1000, num_heads=heads, head_dim=128, batch=batch
    )


def test_a_partly_filled_wave_costs_a_full_one() -> None:
    full = 4.0 * 1280 * 1000 * 128 / RATE
    assert _attend(1280) == pytest.approx(full)
    assert _attend(1) == pytest.approx(full)
    assert _attend(1281) == pytest.approx(2 * full)


def test_tiles_of_heads_and_samples_share_waves() -> None:
    assert _attend(256, heads=5) == pytest.approx(_attend(1280))
    assert _attend(129, heads=5) == pytest.approx(_attend(1280))
    assert _attend(128, heads=5, batch=2) == pytest.approx(_attend(1280))


def test_nothing_to_attend_takes_no_time() -> None:
    assert _attend(0) == 0
    assert _attend(128, heads=0) == 0


def test_a_copy_reads_and_writes() -> None:
    assert COSTS.copy_us(900_000) == pytest.approx(2 * 900_000 / 1.8e6)


def test_a_merge_reads_every_partial_and_writes_once() -> None:
    merged = COSTS.merge_us(out_bytes=100_000, num_partials=3, lse_rows=1000)
    assert merged == pytest.approx((4 * 100_000 + 3 * 4000) / 1.8e6)
    passes = dataclasses.replace(COSTS, merge_passes=8.0)
    again = passes.merge_us(out_bytes=100_000, num_partials=3, lse_rows=1000)
    assert again == pytest.approx(8 * merged)


def test_a_link_reaches_its_bandwidth_with_large_messages() -> None:
    link = Link(100.0, 10.0)
    assert link.effective_gb_per_s(1_000_000) == pytest.approx(50.0)
    assert link.effective_gb_per_s(1e12) == pytest.approx(100.0, rel=1e-3)


@pytest.mark.parametrize("head_dim, rate", [(32, 190), (64, 190), (96, 190), (128, 220)])
def test_a_head_dim_takes_the_rate_of_the_one_below(head_dim: int, rate: float) -> None:
    assert REAL_GPU.attention_rate(head_dim) == rate


@pytest.mark.parametrize(
    "change, named",
    [
        ({"gemm_tflops": 0.0}, "gemm_tflops must be a number above 0, got 0.0"),
        ({"num_units": -1}, "num_units"),
        ({"memory_gb_per_s": float("nan")}, "memory_gb_per_s"),
        ({"kernel_us": -1.0}, "kernel_us must be a number at least 0"),
        ({"attention_tflops": ()}, "attention_tflops"),
        ({"gemm_tflops": "fast"}, "gemm_tflops"),
    ],
)
def test_wrong_numbers_are_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(REAL_GPU, **change)  # type: ignore[arg-type]
