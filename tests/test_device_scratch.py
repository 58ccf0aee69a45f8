"""What calls store lies behind the slots: every output in a place of its own, on every rank."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from swiftfusion_xdit.device_runtime import scratch
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import AttentionShape, Plan
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.schedule.steps import Attend, Merge
from tests.meshes import meshes_of
from tests.sp_cases import uneven


def plan_of(schedule: str, mesh: Mesh) -> Plan:
    lengths = uneven(301, mesh.size)
    shape = AttentionShape(2, lengths, lengths, 8, 4, 64, torch.bfloat16)
    groups = 2 if schedule in ("pipelined", "whole_sequence") else 1
    return Plan(shape, build(schedule, mesh, groups_per_rank=groups))


@pytest.mark.parametrize("schedule", ["torus", "folded", "pipelined", "whole_sequence"])
@pytest.mark.parametrize("mesh", list(meshes_of(4)), ids=str)
def test_places_do_not_overlap_and_cover_every_call(schedule: str, mesh: Mesh) -> None:
    plan = plan_of(schedule, mesh)
    for rank, program in enumerate(plan.schedule.programs):
        places = scratch.places(plan, rank)
        spans = sorted((place.offset_bytes, place.num_bytes) for place in places.values())
        for (start, size), (following, _) in pairwise(spans):
            assert start + size <= following
        assert all(start % 16 == 0 for start, _ in spans)
        assert max((start + size for start, size in spans), default=0) <= scratch.num_bytes(plan)
        for step in program.steps:
            if isinstance(step, Attend):
                assert ("lse", step) in places
                assert (("out", step) in places) != program.in_place(step)
            elif isinstance(step, Merge):
                for chunk in step.queries:
                    several = program.num_partials[chunk, step.heads] > 1
                    wanted = several and chunk != rank
                    assert (("merged", (chunk, step.heads)) in places) == wanted


def test_shapes() -> None:
    plan = plan_of("folded", Mesh(torus=2))
    rows = plan.shape.query_lengths
    places = scratch.places(plan, 0)
    shapes = {key[0]: place.shape for key, place in places.items() if key[0] != "merged"}
    assert shapes["lse"][:2] == (2, 4) and shapes["out"][2:] == (4, 64)
    calls = [key[1] for key in places if key[0] == "out"]
    by_queries = {call.queries: places["out", call].shape[1] for call in calls}
    assert by_queries == {(0,): rows[0], (1,): rows[1]}
