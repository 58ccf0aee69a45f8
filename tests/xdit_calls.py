"""Calls of xDiT's USP on ranks, and what they must give. Run by ranks of tests.distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swiftfusion_xdit.attention.reference import reference_attention
from tests import xdit_cases
from tests.xdit_cases import noise

B, H, D = 2, 6, 16


def usp_module() -> Any:
    import xfuser.model_executor.layers.usp as usp

    return usp


def start(strategy: str = "torus", **arguments: Any) -> Any:
    """A runtime state over all ranks; heads as in B, H, D."""
    config = {"num_attention_heads": arguments.pop("num_heads", H)}
    transformer = type("Transformer", (), {"config": type("Config", (dict,), config)(config)})
    arguments = {"ulysses_degree": 2, "ring_degree": 2, "sp_machines": "2", **arguments}
    return xdit_cases.start(xdit_cases.Holder(transformer), sp_strategy=strategy, **arguments)


def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[b, h, s, d]` attention in fp64."""
    return reference_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def chunks(
    num_rows: int, heads: int, seed: int, sizes: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    """All rows, and the part of each rank; a transposed view, as xDiT passes it."""
    rows = noise(B, num_rows, heads, D, seed=seed).transpose(1, 2)
    return rows, list(rows.split(sizes, dim=2))


def call(
    rank: int,
    *,
    kv_heads: int = H,
    s_q: tuple[int, ...] = (8, 8, 8, 8),
    s_kv: tuple[int, ...] | None = None,
    joint: int = 0,
    joint_strategy: str | None = None,
    **arguments: Any,
) -> float:
    """One USP call on this rank's rows; how far it is from the oracle."""
    s_kv = s_q if s_kv is None else s_kv
    _, my_q = chunks(sum(s_q), H, 1, s_q)
    k, my_k = chunks(sum(s_kv), kv_heads, 2, s_kv)
    v, my_v = chunks(sum(s_kv), kv_heads, 3, s_kv)
    expected = [my_q[rank]]
    if joint_strategy:
        joint_q, joint_k, joint_v = (
            noise(B, h, joint, D, seed=s) for h, s in ((H, 4), (kv_heads, 5), (kv_heads, 6))
        )
        arguments |= {
            "joint_query": joint_q,
            "joint_key": joint_k,
            "joint_value": joint_v,
            "joint_strategy": joint_strategy,
        }
        expected = [joint_q, my_q[rank]] if joint_strategy == "front" else [my_q[rank], joint_q]
        k, v = torch.cat([k, joint_k], dim=2), torch.cat([v, joint_v], dim=2)
    out = usp_module().USP(my_q[rank], my_k[rank], my_v[rank], **arguments)
    return xdit_cases.relative_difference(out, oracle(torch.cat(expected, dim=2), k, v))
