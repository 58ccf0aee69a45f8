"""What a local attention kernel offers to the rest of the package."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .fused import RemoteKeys


class Backend(ABC):
    """A local attention kernel behind one signature, for one device. Backends hold no tensors."""

    name: ClassVar[str]
    device_type: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]]
    # Whether forward returns a log-sum-exp. Without one its outputs cannot be merged, so every
    # call must see all keys of its queries.
    has_lse: ClassVar[bool]
    # Whether the kernel stores into a given `out` itself; if not, a copy follows it.
    writes_out: ClassVar[bool] = False
    # Whether every call must see all rows of the sequence, queries and keys, in order. Implies that
    # outputs are never merged.
    whole_sequence: ClassVar[bool] = False

    # Head dims that the kernel takes: multiples of the first, up to the second.
    head_dim_multiple: int = 1
    max_head_dim: int = sys.maxsize

    def __init__(self, device: torch.device) -> None:
        """Makes the kernel ready to be called on `device`.

        Raises:
            ImportError: the package with the kernel is missing or broken.
            NotImplementedError: the kernel does not run on `device`.
        """
        self.device = device

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """softmax(scale * q k^T) v and its log-sum-exp, for non-empty tensors checked by `attend`.

        q is [B, S_q, H, D], k and v are [B, S_kv, H_kv, D], all with any strides and of one dtype
        in `dtypes`; q head i uses kv head i // (H // H_kv). Returns out [B, S_q, H, D] and lse
        [B, H, S_q], natural log, fp32 (of shape [0] if not `has_lse`), with any strides. Both are
        fresh memory, out in q's dtype, unless `out` says where the result goes.
        """

    def launcher(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] | None:
        """What `forward` launches for tensors like these, without finding that out each time.

        The function takes q, k, v, out and lse, of these shapes and strides, and stores into the
        last two. None if it cannot be told, or if the kernel does not store into what it is given.
        May launch the kernel on the tensors.
        """
        return None

    def not_fused_because(
        self, *, dtype: torch.dtype, head_dim: int, shared_by: int, tile_rows: int
    ) -> str:
        """Why `fused` does not serve such inputs, or nothing.

        Args:
            shared_by: query heads of each kv head.
            tile_rows: keys that it would have to load at a time.
        """
        return f"backend {self.name!r} has no kernel that waits for peers"

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, remote: RemoteKeys
    ) -> None:
        """`forward` into `out` with the given keys and, as they arrive, those of other ranks."""
        raise NotImplementedError(f"backend {self.name!r} has no kernel that waits for peers")


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    """`result` where it is wanted: as it is, or copied into `out`."""
    return result if out is None or result is out else out.copy_(result)
