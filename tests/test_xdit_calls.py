"""What USP is called with, under torus, gives what attention over all ranks' rows gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool

TOLERANCE = 2e-6

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "uneven rows": {"s_q": (9, 8, 1, 0)},
    "fewer keys than queries": {"s_kv": (3, 3, 2, 3)},
    "gqa": {"kv_heads": 2, "kv_head_repeat": 3},
    "joint front": {"joint": 5, "joint_strategy": "front"},
    "joint rear": {"joint": 5, "joint_strategy": "rear"},
    "joint rows fewer than ranks": {"joint": 3, "joint_strategy": "rear"},
    "joint with gqa": {
        "kv_heads": 2,
        "kv_head_repeat": 3,
        "joint": 5,
        "joint_strategy": "front",
    },
    "features that are off": {
        "attn_layer": object(),
        "head_balance_layer": object(),
        "combine_qkv_a2a": True,
    },
    "sparse-only kwargs": {
        "attention_kwargs": {"thw": (1, 2, 3), "vsa_top_k": 1, "attn_mask": None}
    },
}


def errors_by_case(rank: int, world_size: int) -> dict[str, float]:
    with xdit_cases.xdit_groups():
        xdit_calls.start()
        return {name: xdit_calls.call(rank, **case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results(rank_pool: Callable[[int], RankPool]) -> list[dict[str, float]]:
    return rank_pool(4).run(errors_by_case, timeout_s=120)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(results: list[dict[str, float]], name: str) -> None:
    errors = [result[name] for result in results]
    assert max(errors) <= TOLERANCE, (name, errors)


def one_rank(rank: int, world_size: int) -> float:
    with xdit_cases.xdit_groups():
        xdit_calls.start(ulysses_degree=1, ring_degree=1, sp_machines="1")
        return xdit_calls.call(0, s_q=(9,), joint=2, joint_strategy="rear")


def test_one_rank_takes_the_same_path(rank_pool: Callable[[int], RankPool]) -> None:
    assert rank_pool(1).run(one_rank)[0] <= TOLERANCE


def compiled(rank: int, world_size: int) -> tuple[float, int, list[bool]]:
    """The error, the graph breaks, and whether our operator ran eager and compiled."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    usp = xdit_calls.usp_module()

    def layer(q: Any, k: Any, v: Any, joint: Any) -> Any:
        out = usp.USP(
            q * 2,
            k,
            v,
            joint_query=joint,
            joint_key=joint,
            joint_value=joint,
            joint_strategy="rear",
        )
        return out + 1

    with xdit_cases.xdit_groups(), torch.no_grad():
        xdit_calls.start()
        q, k, v = (xdit_cases.noise(2, 6, 8, 16, seed=10 * rank + i) for i in range(3))
        joint = xdit_cases.noise(2, 6, 5, 16, seed=7)
        took_operator = []

        def watched(layer: Callable[..., Any]) -> Any:
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                out = layer(q, k, v, joint)
            names = [event.name for event in seen.events()]
            took_operator.append("swiftfusion::attention" in names)
            return out

        expected = watched(layer)
        graph_breaks = torch._dynamo.explain(layer)(q, k, v, joint).graph_break_count
        out = watched(torch.compile(layer, fullgraph=True, backend="aot_eager"))
        torch._dynamo.reset()
    return xdit_cases.relative_difference(out, expected), graph_breaks, took_operator


def test_compiles_without_a_graph_break(rank_pool: Callable[[int], RankPool]) -> None:
    for error, graph_breaks, took_operator in rank_pool(4).run(compiled, timeout_s=180):
        assert graph_breaks == 0
        assert error <= TOLERANCE
        assert took_operator == [False, True], "the operator costs the host and is for graphs only"
