"""The simulator predicts the paper's table within the bars that it claims."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from statistics import mean

import pytest

from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.paper import (
    COLUMNS,
    PAPER_MAX,
    PAPER_MEAN,
    TABLE,
    Prediction,
    best_swiftfusion,
    best_usp,
    predict,
    two_machines,
)
from swiftfusion_xdit.simulate.transport import CONSTANTS, Constants

# Orders of columns in the paper that the simulator does not give; docs/simulator.md says why.
NOT_EXPLAINED = {
    ("FLUX 3072", 3): {"tas > torus_nccl", "one_sided > torus_nccl"},
    ("FLUX 4096", 4): {"tas > torus_nccl"},
    ("CogVideoX 20 s", 3): {"torus_nccl > one_sided"},
}


def _p4de(num_machines: int) -> Cluster:
    return preset("p4de", num_machines=num_machines)


@lru_cache(maxsize=1)
def _prediction() -> Prediction:
    return predict(_p4de)


def _table() -> str:
    return "\n".join(
        f"{row.workload.name} x {row.workload.num_machines}: "
        + ", ".join(f"{c} {row.speedup(c):.3f} ({row.error(c):+.1%})" for c in COLUMNS)
        for row in _prediction().rows
    )


def test_there_are_fifteen_numbers_and_three_constants() -> None:
    assert len(_prediction().errors()) == 15
    assert len(dataclasses.fields(Constants)) <= 3


def test_mean_error() -> None:
    assert _prediction().mean_error <= 0.15, _table()


@pytest.mark.parametrize("row", range(len(TABLE)))
def test_one_sided_column(row: int) -> None:
    assert abs(_prediction().rows[row].error("one_sided")) <= 0.15, _table()


def test_orderings_hold_but_for_those_that_are_named() -> None:
    for row in _prediction().rows:
        broken = {order for order, holds in row.orderings() if not holds}
        key = (row.workload.name, row.workload.num_machines)
        assert broken == NOT_EXPLAINED.get(key, set()), _table()


def test_four_machines_gain_more_than_three() -> None:
    by_machines = {
        row.workload.num_machines: row for row in _prediction().rows if "3072" in row.workload.name
    }
    for column in ("tas", "one_sided"):
        assert by_machines[4].speedup(column) > by_machines[3].speedup(column), _table()


def test_tas_loses_on_two_machines() -> None:
    for row in two_machines(_p4de).rows:
        assert row.speedup("tas") < 1 < row.speedup("one_sided"), row.workload.name


def test_best_degrees_against_best_degrees() -> None:
    speedups = [
        best_usp(workload, _p4de(workload.num_machines), CONSTANTS).total_us
        / best_swiftfusion(workload, _p4de(workload.num_machines), CONSTANTS).total_us
        for workload in TABLE
    ]
    assert mean(speedups) == pytest.approx(PAPER_MEAN, rel=0.15), speedups
    assert max(speedups) == pytest.approx(PAPER_MAX, rel=0.15), speedups


def test_the_model_and_its_sequence_are_those_of_the_paper() -> None:
    assert [workload.sequence for workload in TABLE] == [37376, 37376, 66048, 167506, 330706]
