"""FlashAttention 2."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .gpu import GpuBackend, load_module

_MODULE = "flash_attn.flash_attn_interface"
_PACKAGE = "flash-attn"
_COMMAND = "pip install --no-build-isolation flash-attn"


class Fa2Backend(GpuBackend):
    """FlashAttention 2. Takes [B, S, H, D] and fewer kv heads; lse [B, H, S], natural log, fp32."""

    name: ClassVar[str] = "fa2"
    majors: ClassVar[tuple[int, ...]] = (8, 9, 10, 11, 12)
    max_head_dim = 256

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        module = load_module(_MODULE, backend=self.name, package=_PACKAGE, command=_COMMAND)
        self._kernel = module.flash_attn_func

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        # Asked for probabilities without dropout, it returns the lse and no probabilities.
        result, lse, _ = self._kernel(q, k, v, softmax_scale=scale, return_attn_probs=True)
        return result, lse
