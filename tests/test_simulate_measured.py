"""The simulator gives what two H200 measured, within a tenth, where GPUs and links decide."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.simulate.measured import Comparison, compare

COMPARISONS = list(compare(preset("h200-2")))


@pytest.mark.parametrize(
    "row", [c for c in COMPARISONS if not c.host_bound], ids=lambda c: f"{c.shape}, {c.what}"
)
def test_layer_over_floor(row: Comparison) -> None:
    assert abs(row.error) <= 0.10, row


@pytest.mark.parametrize(
    "row", [c for c in COMPARISONS if c.host_bound], ids=lambda c: f"{c.shape}, {c.what}"
)
def test_a_layer_that_waits_for_its_host_takes_longer_than_simulated(row: Comparison) -> None:
    assert row.simulated < row.measured, row


def test_most_rows_are_decided_by_the_gpu() -> None:
    assert sum(not row.host_bound for row in COMPARISONS) == 16
