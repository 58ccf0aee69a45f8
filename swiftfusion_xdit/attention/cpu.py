"""Local attention on CPU: the flash attention kernel inside torch, which also gives the lse.

`aten::_scaled_dot_product_flash_attention_for_cpu` takes [B, H, S, D] views with any strides of B,
H and S, so no layout costs a copy. Three things about it are not checked inside and are kept away
from it here:

- no keys or no queries: integer division by zero, which kills the process (`attend` does not get
  here then);
- head dim not contiguous: read as if it were, so a wrong result;
- fewer kv heads than q heads: depending on the torch version, reads out of bounds.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .backend import Backend, deliver


class CpuBackend(Backend):
    """torch's flash attention for CPU. Copies an input only if its rows are not plain rows.

    That is, if its head dim is not contiguous or its rows overlap (expanded along S). GQA copies
    the lse, and with B > 1 also the output.
    """

    name: ClassVar[str] = "cpu"
    device_type: ClassVar[str] = "cpu"
    # Not float64, although the kernel has it: merging is fp32 and would quietly lose the rest.
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(
        {torch.float32, torch.bfloat16, torch.float16}
    )
    has_lse: ClassVar[bool] = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        result, lse = _attend(_plain_rows(q), _plain_rows(k), _plain_rows(v), scale)
        return deliver(result, out), lse


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] with plain rows -> out [B, S_q, H, D], lse [B, H, S_q]."""
    if q.shape[2] == k.shape[2]:
        out, lse = _kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
        return out.transpose(1, 2), lse
    batch = range(q.shape[0])
    parts = [_grouped(q[idx], k[idx], v[idx], scale) for idx in batch]
    if len(parts) == 1:
        return parts[0][0].unsqueeze(0), parts[0][1].unsqueeze(0)
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def _grouped(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """GQA of one sample: q [S_q, H, D], k and v [S_kv, H_kv, D].

    The kv heads take the kernel's batch dim and the q heads of a group its head dim, along which
    one kv head is seen with stride 0. So K and V stay compact and the kernel sees equal counts.
    """
    num_kv_heads = k.shape[1]
    q = q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    k, v = (
        x.transpose(0, 1).unsqueeze(1).expand(num_kv_heads, q.shape[1], *x.shape[::2])
        for x in (k, v)
    )
    out, lse = _kernel(q, k, v, scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.flatten(0, 1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, H, S, D] -> out [B, H, S_q, D], lse [B, H, S_q]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, scale=scale
    )


def _plain_rows(x: Tensor) -> Tensor:
    """x, or a copy if the matrix products inside could not address its rows.

    They read D adjacent elements per row and need the distance of two rows to be at least D.
    """
    _, num_rows, _, head_dim = x.shape
    adjacent = head_dim == 1 or x.stride(3) == 1
    apart = num_rows == 1 or x.stride(1) >= head_dim
    return x if adjacent and apart else x.contiguous()
