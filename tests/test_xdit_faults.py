"""Calls of USP that fail in xDiT itself, and are right under torus.

Faults of model wrappers are in test_xdit_models.py, that of PipeFusion's cache in
test_xdit_patch_cache.py. Where a test of stock fails, xDiT has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool

TOLERANCE = 2e-6
ULYSSES = {"ulysses_degree": 4, "ring_degree": 1}
TWO = {"ulysses_degree": 2, "ring_degree": 2}
RING = {"ulysses_degree": 1, "ring_degree": 4}
JOINT = {"joint": 5, "joint_strategy": "rear"}


def without_lse(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Stands for FlashAttention 4, of which xDiT takes no log-sum-exp."""
    return F.scaled_dot_product_attention(q, k, v), None


# What is called, xDiT's degrees, and what stock raises.
FAULTS: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "6 heads on 4 Ulysses ranks": ({}, ULYSSES, "divisible"),
    "grouped-query attention, 3 key heads on 2 Ulysses ranks": (
        {"kv_heads": 3, "kv_head_repeat": 2},
        TWO,
        "KV heads (3) must be divisible",
    ),
    "grouped-query attention with joint text": (
        {"kv_heads": 2, "kv_head_repeat": 3, **JOINT},
        TWO,
        "does not support joint tensors",
    ),
    "a ring of a backend without a log-sum-exp": ({"backend": "FLASH_4_FP4"}, RING, ""),
}


def attempt(rank: int, world_size: int, strategy: str, name: str) -> float | str:
    import xfuser.core.distributed.attention_backend as backends

    case, degrees, _ = FAULTS[name]
    arguments = dict(case)
    registry, types = backends.ATTENTION_FUNCTION_REGISTRY, backends.AttentionBackendType
    known = dict(registry)
    if "backend" in arguments:
        arguments["backend"] = types[arguments["backend"]]
        registry[arguments["backend"]] = without_lse
    # xDiT would refuse the heads when it starts; what is asked for here is its USP.
    heads = 4 * xdit_calls.H
    try:
        with xdit_cases.xdit_groups():
            xdit_calls.start(strategy, num_heads=heads, **degrees)
            return xdit_calls.call(rank, **arguments)
    except Exception as error:  # whatever stock raises
        if strategy == "torus":
            raise
        return f"{type(error).__name__}: {error}"
    finally:
        registry.clear()
        registry.update(known)


@pytest.mark.parametrize("name", FAULTS)
def test_stock_fails(rank_pool: Callable[[int], RankPool], name: str) -> None:
    for raised in rank_pool(4).run(attempt, "usp", name, timeout_s=120):
        assert isinstance(raised, str), (name, raised)
        assert FAULTS[name][2] in raised


@pytest.mark.parametrize("name", FAULTS)
def test_torus_is_right(rank_pool: Callable[[int], RankPool], name: str) -> None:
    errors = rank_pool(4).run(attempt, "torus", name, timeout_s=120)
    assert max(errors) <= TOLERANCE, (name, errors)


def heads_of_a_model(rank: int, world_size: int, strategy: str) -> str:
    with xdit_cases.xdit_groups():
        try:
            xdit_calls.start(strategy, **ULYSSES)
        except Exception as error:  # whatever stock raises
            return f"{type(error).__name__}: {error}"
    return "started"


def test_stock_does_not_start_with_heads_that_do_not_divide(
    rank_pool: Callable[[int], RankPool],
) -> None:
    for said in rank_pool(4).run(heads_of_a_model, "usp", timeout_s=60):
        assert "divisible" in said
    for said in rank_pool(4).run(heads_of_a_model, "torus", timeout_s=60):
        assert said == "started"


def compiled(rank: int, world_size: int, strategy: str) -> str:
    """Of a layer over a ring, as one graph."""
    usp = xdit_calls.usp_module()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return usp.USP(q * 2, k, v) + 1

    with xdit_cases.xdit_groups(), torch.no_grad():
        xdit_calls.start(strategy, **RING)
        q, k, v = (xdit_cases.noise(2, 6, 8, 16, seed=10 * rank + i) for i in range(3))
        expected = layer(q, k, v)
        try:
            out = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
        except Exception as error:  # whatever the compiler raises
            return f"{type(error).__name__}: {error}"
        finally:
            torch._dynamo.reset()
    return "equal" if xdit_cases.relative_difference(out, expected) <= TOLERANCE else "wrong"


def test_torus_compiles_a_ring_as_one_graph(rank_pool: Callable[[int], RankPool]) -> None:
    assert set(rank_pool(4).run(compiled, "torus", timeout_s=180)) == {"equal"}
