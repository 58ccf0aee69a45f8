"""cuDNN's fused attention, through torch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .gpu import GpuBackend
from .sdpa_flash import torch_flash_attention

# The first that takes any number of queries.
_MIN_VERSION = 90000


class CudnnBackend(GpuBackend):
    """`aten::_scaled_dot_product_cudnn_attention`, which builds a plan for every new shape.

    Takes [B, H, S, D] views and fewer kv heads. Its lse is [B, H, S, 1], natural log, fp32. Its
    output has the order of strides that q has. One query or one key, which cuDNN does not take in
    all versions, go to torch's own flash attention.
    """

    name: ClassVar[str] = "cudnn"
    majors: ClassVar[tuple[int, ...]] = (8, 9, 10, 11, 12)
    max_head_dim = 128

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        if version is None or version < _MIN_VERSION:
            raise NotImplementedError(
                f"attention backend 'cudnn' needs cuDNN {_MIN_VERSION} or later in torch "
                f"(torch.backends.cudnn.version()); got {version}: pip install --upgrade torch"
            )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if q.shape[1] == 1 or k.shape[1] == 1:
            return torch_flash_attention(q, k, v, scale)
        result, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None,
            True,
            0.0,
            False,
            False,
            scale=scale,
        )
        return result.transpose(1, 2), lse.flatten(2)
