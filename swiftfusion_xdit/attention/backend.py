"""What a local attention kernel offers to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Backend(ABC):
    """A local attention kernel behind one signature. Backends hold no tensors and no state."""

    name: ClassVar[str]
    device_type: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]]
    # Whether forward returns a log-sum-exp. Without one its outputs cannot be merged, so every
    # call must see all keys of its queries.
    has_lse: ClassVar[bool]

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """softmax(scale * q k^T) v and its log-sum-exp, for non-empty tensors checked by `attend`.

        q is [B, S_q, H, D], k and v are [B, S_kv, H_kv, D], all with any strides and of one dtype
        in `dtypes`; q head i uses kv head i // (H // H_kv). Returns out [B, S_q, H, D] in q's dtype
        and lse [B, H, S_q], natural log, fp32 (of shape [0] if not `has_lse`). Both are fresh
        memory, with any strides.
        """
