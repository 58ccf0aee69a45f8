"""Exact for drawn lengths, head counts, GQA, batch, strides and empty chunks."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.meshes import meshes_up_to
from tests.sp_cases import LAYOUTS, Case, run_cases


@st.composite
def cases(draw: st.DrawFn) -> Case:
    mesh = draw(st.sampled_from(meshes_up_to(4)))
    num_kv_heads = draw(st.integers(1, 6))
    shared_by = draw(st.integers(1, 3))
    while num_kv_heads * shared_by < mesh.num_head_groups:
        shared_by += 1
    lengths = st.lists(st.integers(0, 9), min_size=mesh.size, max_size=mesh.size)
    query_lengths, key_lengths = draw(lengths), draw(lengths)
    if not any(key_lengths):
        key_lengths[draw(st.integers(0, mesh.size - 1))] = 1
    return Case(
        mesh=mesh,
        query_lengths=tuple(query_lengths),
        key_lengths=tuple(key_lengths),
        schedule=draw(st.sampled_from(["torus", "folded", "pipelined"])),
        machines=mesh.torus,
        batch=draw(st.integers(1, 3)),
        num_heads=num_kv_heads * shared_by,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 24, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 999)),
    )


@given(case=cases())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_against_the_oracle(rank_pool, case: Case) -> None:
    bound = 2e-6 if case.dtype == torch.float32 else 1e-2
    errors = rank_pool(case.mesh.size).run(run_cases, [case], 2)
    assert max(errors) <= bound, (case, errors)
