"""FlashAttention 3, the C++ kernels for Hopper."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from .gpu import GpuBackend, load_module

_MODULE = "flash_attn_interface"
_PACKAGE = "flash-attn-3"
_COMMAND = (
    "pip install --no-build-isolation "
    "'git+https://github.com/Dao-AILab/flash-attention.git#subdirectory=hopper'"
)


class Fa3Backend(GpuBackend):
    """FlashAttention 3. Takes [B, S, H, D] and fewer kv heads; lse [B, H, S], natural log, fp32."""

    name: ClassVar[str] = "fa3"
    majors: ClassVar[tuple[int, ...]] = (8, 9)
    max_head_dim = 256

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        module = load_module(_MODULE, backend=self.name, package=_PACKAGE, command=_COMMAND)
        self._kernel = module.flash_attn_func
        # Early versions return the lse unasked and know no such argument.
        asks = "return_attn_probs" in inspect.signature(self._kernel).parameters
        self._options: dict[str, Any] = {"return_attn_probs": True} if asks else {}

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        result, lse, *_ = self._kernel(q, k, v, softmax_scale=scale, **self._options)
        return result, lse
