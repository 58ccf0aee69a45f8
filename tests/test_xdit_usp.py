"""xDiT's own USP and ring attention, untouched under ``usp``: what the plugin takes them to do.

A failure here says that xfuser, or torch beneath it, has changed, not that torus is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool

TOLERANCE = 2e-6
DEGREES = {"ulysses x ring": (2, 2), "ring": (1, 4), "ulysses": (2, 1)}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "combined exchange": {"combine_qkv_a2a": True},
    "joint front": {"joint": 5, "joint_strategy": "front"},
    "joint rear": {"joint": 5, "joint_strategy": "rear"},
    "gqa": {"kv_heads": 2, "kv_head_repeat": 3},
    "gqa, combined exchange": {"kv_heads": 2, "kv_head_repeat": 3, "combine_qkv_a2a": True},
}


def errors(rank: int, world_size: int, degrees: tuple[int, int]) -> dict[str, float]:
    arguments = {"ulysses_degree": degrees[0], "ring_degree": degrees[1], "sp_machines": None}
    with xdit_cases.xdit_groups():
        xdit_calls.start("usp", **arguments)
        usp = xdit_calls.usp_module()
        assert usp.USP.__code__.co_filename == usp.__file__
        s_q = (8,) * world_size
        return {name: xdit_calls.call(rank, s_q=s_q, **case) for name, case in CASES.items()}


@pytest.mark.parametrize("degrees", DEGREES)
def test_usp(rank_pool: Callable[[int], RankPool], degrees: str) -> None:
    ulysses, ring = DEGREES[degrees]
    results = rank_pool(ulysses * ring).run(errors, (ulysses, ring), timeout_s=120)
    for name in CASES:
        values = [result[name] for result in results]
        assert max(values) <= TOLERANCE, (degrees, name, values)


def ring_error(rank: int, world_size: int) -> float:
    """Of ``ring_attn`` itself, with the function that USP would give it."""
    with xdit_cases.xdit_groups():
        xdit_calls.start("usp", ulysses_degree=1, ring_degree=world_size, sp_machines=None)
        usp = xdit_calls.usp_module()
        rows = 8 * world_size
        q, k, v = (xdit_cases.noise(2, xdit_calls.H, rows, xdit_calls.D, seed=i) for i in range(3))
        mine = [x.chunk(world_size, dim=2)[rank].contiguous() for x in (q, k, v)]
        out = usp.ring_attn(usp._get_attention_function(), *mine)
        return xdit_cases.relative_difference(out, xdit_calls.oracle(mine[0], k, v))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ring_attention(rank_pool: Callable[[int], RankPool], ranks: int) -> None:
    assert max(rank_pool(ranks).run(ring_error, timeout_s=120)) <= TOLERANCE


def joint_strategies(rank: int, world_size: int) -> str:
    with xdit_cases.xdit_groups():
        xdit_calls.start("usp", sp_machines=None)
        with pytest.raises(ValueError) as caught:
            xdit_calls.call(rank, joint=5, joint_strategy="middle")
        return str(caught.value)


def test_there_are_two_joint_strategies(rank_pool: Callable[[int], RankPool]) -> None:
    for message in rank_pool(4).run(joint_strategies, timeout_s=60):
        assert "joint_strategy" in message and "middle" in message
