"""Compiles and launches FlashAttention 4's Hopper kernel that waits for its peers.

It extends a class of a beta package, so it is used only where that class is as it is known here.
Each dtype, head dim and number of query heads that share a kv head is compiled once in a process,
which takes one to two seconds, or once for all processes where flash-attn-4 keeps its kernels on
disk (``FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1``); lengths, strides, peers and layers are run-time
arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .fused import RemoteKeys

logger = logging.getLogger(__name__)

TESTED_VERSIONS = ("4.0.0b36",)
HEAD_DIMS = (64, 128)
Kind = tuple[torch.dtype, int, int]


@lru_cache(maxsize=1)
def _extension() -> tuple[ModuleType | None, str]:
    """The module with the kernel, or why there is none."""
    try:
        from . import fa4_fused_kernel

        version = metadata.version("flash-attn-4")
    except Exception as error:  # whatever a beta package may raise when it has changed
        return None, f"flash-attn-4 cannot be extended: {type(error).__name__}: {error}"
    if unknown := fa4_fused_kernel.unknown_signature():
        return None, f"flash-attn-4 is not as it is known here: {unknown}"
    if version not in TESTED_VERSIONS:
        logger.info(
            "flash-attn-4 %s has the signatures of %s, with which the fused kernel was tested",
            version,
            ", ".join(TESTED_VERSIONS),
        )
    return fa4_fused_kernel, ""


class FusedLaunches:
    """The compiled kernels of one device, by dtype, head dim and query heads of each kv head."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compiled: dict[Kind, Callable[..., Any] | str] = {}

    def not_fused_because(
        self, *, dtype: torch.dtype, head_dim: int, shared_by: int, tile_rows: int
    ) -> str:
        """Why the kernel does not serve such inputs with tiles of so many keys, or nothing.

        Compiles it, the first time: what a beta package makes of an extension is known then.
        """
        if head_dim not in HEAD_DIMS:
            return f"the kernel that waits for peers has head dims {HEAD_DIMS}, got {head_dim}"
        module, reason = _extension()
        if module is None:
            return reason
        tile_n = module.tile_of(head_dim).n_block_size
        if tile_n != tile_rows:
            return f"flash-attn-4 loads {tile_n} keys, not {tile_rows}"
        kernel = self._kernel((dtype, head_dim, shared_by))
        return kernel if isinstance(kernel, str) else ""

    def _kernel(self, kind: Kind) -> Callable[..., Any] | str:
        """The kernel, or why it cannot be compiled."""
        if kind not in self._compiled:
            module, _ = _extension()
            assert module is not None
            dtype, head_dim, shared_by = kind
            # Any sizes do; those of 1 would be taken for constants.
            q, k = (
                torch.empty(2, 256, heads, head_dim, dtype=dtype, device=self._device)
                for heads in (2 * shared_by, 2)
            )
            try:
                self._compiled[kind] = module.kernel_for(q, k, k, q)
            except Exception as error:
                logger.warning("the fused kernel was not compiled", exc_info=True)
                lines = str(error).splitlines() or [""]
                self._compiled[kind] = f"not compiled: {type(error).__name__}: {lines[0]}"
        return self._compiled[kind]

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, remote: RemoteKeys
    ) -> None:
        """Attention of q ``[B, S_q, H, D]`` with k, v ``[B, S_kv, H_kv, D]`` and remote ones."""
        module, _ = _extension()
        kernel = self._kernel((q.dtype, q.shape[3], q.shape[2] // k.shape[2]))
        assert module is not None and callable(kernel), kernel
        q, k, v = (x.detach() for x in (q, k, v))
        kernel(*module.arguments(q, k, v, out, scale, remote))
