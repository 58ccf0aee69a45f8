"""Choosing between plans by their times: all ranks alike, the slowest one's time counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit import tuning
from swiftfusion_xdit.attention.cpu import CpuBackend
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from swiftfusion_xdit.autoplan import MOST_NEAR, near
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import AttentionShape, Plan, make_plan
from swiftfusion_xdit.planner import Choice, Outcome, Prediction
from swiftfusion_xdit.planner.candidates import Candidate
from swiftfusion_xdit.runtime import LayerRunner
from swiftfusion_xdit.sequence_parallel import SequenceParallel
from tests.distributed import RankPool

SCHEDULES = ("torus", "pipelined", "folded")


class Slow(CpuBackend):
    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        time.sleep(0.02)
        return super().forward(*arguments, **options)


def choose(rank: int, size: int, fast: str) -> tuple[str, float]:
    """The plan that is taken where rank 1 attends slowly in all but one; the error afterwards."""
    lengths = (7, 9)
    shape = AttentionShape(1, lengths, lengths, 4, 4, 8, torch.float32)
    whole = [
        torch.randn(1, sum(lengths), 4, 8, generator=torch.Generator().manual_seed(seed))
        for seed in range(3)
    ]
    with SequenceParallel(machines=2) as sp:
        plans = [make_plan(shape, sp.topology, schedule=name) for name in SCHEDULES]

        def make_runner(plan: Plan) -> LayerRunner:
            is_slow = rank == 1 and plan.schedule.name != fast
            backend = Slow(torch.device("cpu")) if is_slow else sp.backend
            return LayerRunner(plan, sp._comm, backend)

        number, times_us = tuning.fastest(
            plans, make_runner, sp._agreement, rank, torch.device("cpu")
        )
        assert len(times_us) == len(plans) and min(times_us) == times_us[number]
        mine = [x.split(lengths, dim=1)[rank].contiguous() for x in whole]
        expected = reference_attention(*whole).split(lengths, dim=1)[rank]
        return plans[number].schedule.name, relative_error(sp.attention(*mine), expected)


@pytest.mark.parametrize("fast", SCHEDULES)
def test_the_fastest_on_the_slowest_rank_is_taken(
    fast: str, rank_pool: Callable[[int], RankPool]
) -> None:
    for name, error in rank_pool(2).run(choose, fast):
        assert name == fast and error <= 1e-5


def test_a_plan_that_was_predicted_to_be_faster_is_kept_where_nothing_is_won(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter((100.0, 99.0, 97.0, 96.5))
    monkeypatch.setattr(tuning, "_time_us", lambda *_: next(times))
    monkeypatch.setattr(tuning, "_inputs", lambda *_: [])
    plan: Any = type("Plan", (), {"shape": None})
    agreement: Any = None
    number, _ = tuning.fastest([plan] * 4, lambda plan: plan, agreement, 0, torch.device("cpu"))
    assert number == 2


def outcome(mesh: Mesh, schedule: str, layer_us: float | None, strategy: str = "torus") -> Outcome:
    prediction = None if layer_us is None else Prediction(layer_us, 50.0, 50.0, 0.0, 0, 0)
    return Outcome(Candidate(strategy, mesh, schedule), prediction)


def test_what_is_timed_is_near_and_of_another_mesh_or_schedule() -> None:
    ring, torus = Mesh(ring=4), Mesh(torus=4)
    chosen = outcome(ring, "fused", 100.0)
    assert chosen.prediction is not None
    others = (
        outcome(ring, "fused", 101.0),
        outcome(ring, "torus", 104.0),
        outcome(ring, "torus", 105.0),
        outcome(torus, "torus", 110.0, "tas"),
        outcome(torus, "pipelined", 120.0),
        outcome(torus, "folded", 126.0),
        outcome(torus, "torus", None),
    )
    choice = Choice("time", chosen.candidate, chosen.prediction, others)
    assert near(choice) == [others[1].candidate, others[4].candidate]
    many = [outcome(Mesh(ring=n), "torus", 100.0 + n) for n in range(2, 9)]
    choice = Choice("time", chosen.candidate, chosen.prediction, tuple(many))
    assert near(choice) == [each.candidate for each in many[:MOST_NEAR]]
