"""xDiT's own sparse and quantised kernels, under torus, see what they would see in one process.

The kernels run on GPUs only, so functions in their places here depend on all that those depend on:
where a row lies, what else its head holds, what else travels with the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftfusion_xdit.xdit import session as sessions
from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool

TOLERANCE = 2e-6
ROWS, BLOCK = 32, 4
# Without a ring, so that a forced mesh is one that these kernels can run in.
FORCED: tuple[dict[str, str], ...] = (
    {},
    {"sp_mesh": "torus=1,ulysses=4,ring=1"},
    {"sp_schedule": "fused"},
    {"sp_mesh": "torus=4,ulysses=1,ring=1", "sp_schedule": "pipelined"},
)


def quantised(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Keys and values in steps of their head's largest element."""
    k, v = (_rounded(x) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v), None


def _rounded(x: Tensor) -> Tensor:
    step = x.abs().amax(dim=(0, 2, 3), keepdim=True) / 7
    return (x / step).round() * step


def sparse(q: Tensor, k: Tensor, v: Tensor, *, attention_kwargs: Any, **_: Any) -> Any:
    """Every other block of keys, by where queries and keys lie; ``thw`` shifts which."""
    shift = (attention_kwargs or {}).get("thw", (0,))[0]
    rows, keys = (torch.arange(x.shape[2]) // BLOCK for x in (q, k))
    mask = (rows[:, None] + keys[None] + shift) % 2 == 0
    sink = (attention_kwargs or {}).get("_hb_cost_sink")
    if sink is not None:
        sink.copy_(k.square().sum(dim=(0, 2, 3)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None


def gated(q: Tensor, k: Tensor, v: Tensor, *, attention_kwargs: Any, **_: Any) -> Any:
    """With a tensor of the queries' shape that travels beside them."""
    return F.scaled_dot_product_attention(q, k, v) * attention_kwargs["gate"], None


FUNCTIONS = {"SAGE": quantised, "AITER_SPARGE": sparse, "FLEX_VSA_H3": gated}
# Name of a case: backend, further arguments of the call.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quantised": ("SAGE", {}),
    "quantised, gqa": ("SAGE", {"kv_head_repeat": 3}),
    "sparse": ("AITER_SPARGE", {}),
    "sparse, with arguments": ("AITER_SPARGE", {"attention_kwargs": {"thw": (1, 4, 8)}}),
    "sparse, valid length": ("AITER_SPARGE", {"attention_kwargs": {"valid_kv_len": 21}}),
    "quantised, valid length": ("SAGE", {"attention_kwargs": {"valid_kv_len": 21}}),
    "sparse, head balance": ("AITER_SPARGE", {"head_balance_layer": "layer"}),
    "extra inputs": ("FLEX_VSA_H3", {"attention_kwargs": {"ulysses_extra_inputs": ("gate",)}}),
}


def backends() -> Any:
    import xfuser.core.distributed.attention_backend as attention_backend

    return attention_backend


def results(rank: int, world_size: int, strategy: str, arguments: Any) -> dict[str, float]:
    """How far every case is from its function on whole tensors."""
    registry = backends().ATTENTION_FUNCTION_REGISTRY
    types = backends().AttentionBackendType
    known = dict(registry)
    try:
        registry.update({types[name]: function for name, function in FUNCTIONS.items()})
        with xdit_cases.xdit_groups():
            xdit_calls.start(strategy, **arguments)
            found = {name: one(rank, world_size, *case) for name, case in CASES.items()}
            if arguments.get("sp_mesh"):
                assert meshes_in_use() == {arguments["sp_mesh"]}
            return found
    finally:
        registry.clear()
        registry.update(known)


def meshes_in_use() -> set[str]:
    """Of all that the session has attended with."""
    session = sessions.current()
    assert session is not None and session._open
    return {str(opened.plan.mesh) for opened in session._open.values()}


def one(rank: int, size: int, backend: str, arguments: dict[str, Any]) -> float:
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    kv_heads = xdit_calls.H // arguments.get("kv_head_repeat", 1)
    q, k, v, gate = (
        xdit_cases.noise(xdit_calls.B, heads, ROWS, xdit_calls.D, seed=seed)
        for seed, heads in enumerate((xdit_calls.H, kv_heads, kv_heads, xdit_calls.H))
    )
    whole_kwargs = dict(arguments.get("attention_kwargs") or {})
    kwargs = dict(whole_kwargs)
    if "ulysses_extra_inputs" in kwargs:
        whole_kwargs["gate"], kwargs["gate"] = gate, gate[:, :, mine]
    repeats, valid = xdit_calls.H // kv_heads, kwargs.get("valid_kv_len", ROWS)
    expected, _ = FUNCTIONS[backend](
        q,
        k[:, :, :valid].repeat_interleave(repeats, dim=1),
        v[:, :, :valid].repeat_interleave(repeats, dim=1),
        attention_kwargs=whole_kwargs,
    )
    more = {"attention_kwargs": kwargs or None, "head_balance_layer": balanced(arguments)}
    out = xdit_calls.usp_module().USP(
        *(x[:, :, mine] for x in (q, k, v)),
        backend=backends().AttentionBackendType[backend],
        **{**arguments, **more},
    )
    return xdit_cases.relative_difference(out, expected[:, :, mine])


def balanced(arguments: dict[str, Any]) -> Any:
    """A layer whose heads xDiT deals out by their cost."""
    if "head_balance_layer" not in arguments:
        return None
    layer = torch.nn.Module()
    layer.register_buffer("head_perm", torch.tensor([5, 0, 3, 1, 4, 2]))
    return layer


@pytest.mark.parametrize("forced", FORCED)
def test_sees_the_whole_sequence(
    rank_pool: Callable[[int], RankPool], forced: dict[str, str]
) -> None:
    arguments = {**forced, "use_spargeattn_head_balance": True}
    found = rank_pool(4).run(results, "torus", arguments, timeout_s=120)
    for name in CASES:
        values = [result[name] for result in found]
        assert max(values) <= TOLERANCE, (name, values)


def test_as_under_xdits_ulysses(rank_pool: Callable[[int], RankPool]) -> None:
    """The oracle is what xDiT's own layout for these kernels gives too."""
    arguments = {"ring_degree": 1, "sp_machines": "auto", "use_spargeattn_head_balance": True}
    found = rank_pool(2).run(results, "usp", arguments, timeout_s=120)
    for name in CASES:
        values = [result[name] for result in found]
        assert max(values) <= TOLERANCE, (name, values)


def refused(rank: int, world_size: int) -> dict[str, str]:
    types = backends().AttentionBackendType
    registry = backends().ATTENTION_FUNCTION_REGISTRY
    known = dict(registry)
    q = xdit_cases.noise(1, 3, 8, 16)
    joint = {"joint_query": q, "joint_key": q, "joint_value": q, "joint_strategy": "rear"}
    gate = {"ulysses_extra_inputs": ("gate",), "gate": q[:, :, :4]}
    calls: dict[str, tuple[int, str, dict[str, Any]]] = {
        "joint_strategy='rear' with the sparse backend AITER_SPARGE": (3, "AITER_SPARGE", joint),
        "attention_kwargs['ulysses_extra_inputs'] 'gate' of shape (1, 3, 4, 16)": (
            3,
            "FLEX_VSA_H3",
            {"attention_kwargs": gate},
        ),
        "attention backend SAGE with 3 heads on 4 ranks": (3, "SAGE", {}),
    }
    found = {}
    try:
        registry.update({types[name]: function for name, function in FUNCTIONS.items()})
        with xdit_cases.xdit_groups():
            xdit_calls.start(num_heads=3)
            for name, (_, backend, arguments) in calls.items():
                with pytest.raises(NotImplementedError) as caught:
                    xdit_calls.usp_module().USP(q, q, q, backend=types[backend], **arguments)
                found[name] = str(caught.value)
    finally:
        registry.clear()
        registry.update(known)
    return found


def test_what_cannot_be_served_is_refused_by_name(rank_pool: Callable[[int], RankPool]) -> None:
    for found in rank_pool(4).run(refused, timeout_s=120):
        assert len(found) == 3
        for expected, message in found.items():
            assert expected in message
            assert "--sp-fallback usp" in message
