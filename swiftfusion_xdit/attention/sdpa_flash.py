"""FlashAttention 2 as built into torch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .gpu import GpuBackend


class SdpaFlashBackend(GpuBackend):
    """`aten::_scaled_dot_product_flash_attention`, which is there in every torch for CUDA.

    Takes [B, H, S, D] views and fewer kv heads; lse [B, H, S], natural log, fp32.
    """

    name: ClassVar[str] = "sdpa_flash"
    majors: ClassVar[tuple[int, ...]] = (8, 9, 10, 11, 12)
    max_head_dim = 256

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return torch_flash_attention(q, k, v, scale)


def torch_flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, S, H, D] -> out [B, S_q, H, D], lse [B, H, S_q]."""
    result, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, False, False, scale=scale
    )
    return result.transpose(1, 2), lse
