"""What one rank brings to an attention layer: checked, and summed up in a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swiftfusion_xdit.plan import AttentionShape

# Ranks exchange a dtype as its index.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LocalSizes(NamedTuple):
    """The sizes of one rank's q and k, as ranks exchange them."""

    batch: int
    query_length: int
    num_heads: int
    head_dim: int
    key_length: int
    num_kv_heads: int
    dtype: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> LocalSizes:
        batch, query_length, num_heads, head_dim = q.shape
        _, key_length, num_kv_heads, _ = k.shape
        dtype = DTYPES.index(q.dtype)
        return cls(batch, query_length, num_heads, head_dim, key_length, num_kv_heads, dtype)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, device: torch.device) -> None:
    """Check that one rank's q, k and v fit each other and the group's device.

    Raises:
        ValueError: naming the rule and what was passed.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        rule = "q must be [B, s_q, H, D] and k, v [B, s_kv, H_kv, D]"
    elif q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        rule = "q, k and v must have the same batch and head dim"
    elif 0 in (q.shape[0], q.shape[2], q.shape[3], k.shape[2]) or q.shape[2] % k.shape[2]:
        rule = "H must be a positive multiple of H_kv, B and D positive"
    else:
        rule = ""
    if rule:
        shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{rule}; {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k and v must have one dtype of {', '.join(map(str, DTYPES))}; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device or q.device.type != device.type:
        raise ValueError(
            f"q, k and v must be on this group's device {device}; "
            f"got {q.device}, {k.device}, {v.device}"
        )


def shape_of(everyone: Sequence[LocalSizes], *, wire: str = "exact") -> AttentionShape:
    """The layer of a group from the sizes of all ranks, in rank order.

    Raises:
        ValueError: batch, heads, head dim or dtype differ between ranks; lengths may.
    """
    names = {"batch": "batch", "num_heads": "H", "head_dim": "D", "num_kv_heads": "H_kv"}
    for field, name in (*names.items(), ("dtype", "dtype")):
        values = [getattr(sizes, field) for sizes in everyone]
        if len(set(values)) > 1:
            shown = [DTYPES[value] for value in values] if name == "dtype" else values
            raise ValueError(f"{name} must be the same on every rank, got {shown} by rank")
    first = everyone[0]
    return AttentionShape(
        batch=first.batch,
        query_lengths=tuple(sizes.query_length for sizes in everyone),
        key_lengths=tuple(sizes.key_length for sizes in everyone),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        dtype=DTYPES[first.dtype],
        wire=wire,
    )
