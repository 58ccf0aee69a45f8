"""What is not USP stays xDiT's under torus: its classes run on xDiT's own groups, and are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool
from tests.long_context import real_classes

TOLERANCE = 1e-5
ROWS = 32


def inputs(rank: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k and v `[b, s, h, d]`, whole, and this rank's rows."""
    whole = [
        xdit_cases.noise(xdit_calls.B, ROWS, xdit_calls.H, xdit_calls.D, seed=i) for i in range(3)
    ]
    return whole, [x.chunk(size, dim=1)[rank].contiguous() for x in whole]


def step_video(rank: int, world_size: int, strategy: str, joint_strategy: str) -> float:
    with real_classes() as package, xdit_cases.xdit_groups(), torch.no_grad():
        from yunchang.kernels import AttnType

        xdit_calls.start(strategy)
        (_, k, v), mine = inputs(rank, world_size)
        joint: dict[str, Any] = {"joint_strategy": "none"}
        my_q = mine[0]
        if joint_strategy != "none":
            text = [xdit_cases.noise(xdit_calls.B, 4, xdit_calls.H, xdit_calls.D, seed=9)] * 3
            names = ("joint_tensor_query", "joint_tensor_key", "joint_tensor_value")
            joint = {"joint_strategy": joint_strategy, **dict(zip(names, text, strict=True))}
            k, v = (torch.cat([x, text[0]], dim=1) for x in (k, v))
            parts = [text[0], my_q] if joint_strategy == "front" else [my_q, text[0]]
            my_q = torch.cat(parts, dim=1)
        attention = package.xFuserLongContextAttention(attn_type=AttnType.TORCH_FLASH)
        out = attention(None, *mine, **joint)
        expected = xdit_calls.oracle(*(x.transpose(1, 2) for x in (my_q, k, v)))
        return xdit_cases.relative_difference(out.transpose(1, 2), expected)


@pytest.mark.parametrize("joint_strategy", ["none", "front", "rear"])
@pytest.mark.parametrize("strategy", ["usp", "torus"])
def test_long_context_attention(
    rank_pool: Callable[[int], RankPool], strategy: str, joint_strategy: str
) -> None:
    errors = rank_pool(4).run(step_video, strategy, joint_strategy, timeout_s=120)
    assert max(errors) <= TOLERANCE, errors


def sana_linear(rank: int, world_size: int, strategy: str) -> float:
    with real_classes() as package, xdit_cases.xdit_groups(), torch.no_grad():
        from yunchang.kernels import AttnType

        xdit_calls.start(strategy)
        (q, k, v), mine = inputs(rank, world_size)
        attention = package.xFuserSanaLinearLongContextAttention(attn_type=AttnType.FA)
        out = attention(None, *mine)
        # relu(q) (relu(k)^T v), over relu(q) times the sum of relu(k).
        queries, keys, values = (x.double().transpose(1, 2) for x in (F.relu(q), F.relu(k), v))
        sums = keys.sum(dim=2, keepdim=True).transpose(2, 3)
        expected = queries @ (keys.transpose(2, 3) @ values) / (queries @ sums)
        expected = expected.transpose(1, 2).flatten(2).chunk(world_size, dim=1)[rank]
        return xdit_cases.relative_difference(out, expected)


@pytest.mark.parametrize("strategy", ["usp", "torus"])
def test_sana_linear_attention(rank_pool: Callable[[int], RankPool], strategy: str) -> None:
    errors = rank_pool(4).run(sana_linear, strategy, timeout_s=120)
    assert max(errors) <= TOLERANCE, errors
