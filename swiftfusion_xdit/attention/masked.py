"""Attention under a mask: torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import Backend, deliver


class MaskedBackend(Backend):
    """`F.scaled_dot_product_attention` with ``mask``, on the CPU or a GPU.

    ``mask`` is ``[B or 1, 1, S_q or 1, S_kv or 1]`` over the whole sequence: boolean, True where a
    query attends a key, or of q's dtype and added to the scaled scores. Set it before a layer. A
    query that attends no key gets 0.
    """

    name: ClassVar[str] = "masked"
    device_type: str  # type: ignore[misc]
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(
        {torch.float32, torch.bfloat16, torch.float16}
    )
    has_lse: ClassVar[bool] = False
    whole_sequence: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.device_type = device.type
        self.mask: Tensor | None = None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        mask = self.mask
        result = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        if mask is not None and mask.dtype == torch.bool:
            # Kernels differ in what they give where a row of the mask is empty.
            result = result.masked_fill(~mask.any(dim=-1, keepdim=True), 0)
        return deliver(result.transpose(1, 2), out), q.new_empty(0, dtype=torch.float32)
