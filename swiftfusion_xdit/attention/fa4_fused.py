"""Compiles and launches FlashAttention 4's Hopper kernel that waits for its peers.

It extends a class of a beta package, so it is used only where that class is as it is known here.
Each dtype, head dim and number of query heads that share a kv head is compiled once in a process,
which takes one to two seconds; lengths, strides, peers and layers are run-time arguments.
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


@lru_cache(maxsize=1)
def _extension() -> tuple[ModuleType | None, str]:
    """The module with the kernel, or why there is none."""
    try:
        from . import fa4_fused_kernel
    except Exception as error:  # whatever a beta package may raise when it has changed
        return None, f"flash-attn-4 cannot be extended: {type(error).__name__}: {error}"
    if unknown := fa4_fused_kernel.unknown_signature():
        return None, f"flash-attn-4 is not as it is known here: {unknown}"
    version = metadata.version("flash-attn-4")
    if version not in TESTED_VERSIONS:
        logger.info(
            "flash-attn-4 %s has the signatures of %s, with which the fused kernel was tested",
            version,
            ", ".join(TESTED_VERSIONS),
        )
    return fa4_fused_kernel, ""


def not_fused_because(head_dim: int, tile_rows: int) -> str:
    """Why the kernel does not serve a head dim with tiles of so many keys, or nothing."""
    if head_dim not in HEAD_DIMS:
        return f"the kernel that waits for peers has head dims {HEAD_DIMS}, got {head_dim}"
    module, reason = _extension()
    if module is None:
        return reason
    tile_n = module.tile_of(head_dim).n_block_size
    return "" if tile_n == tile_rows else f"flash-attn-4 loads {tile_n} keys, not {tile_rows}"


class FusedLaunches:
    """The compiled kernels of one device."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[torch.dtype, int, int], Callable[..., Any]] = {}

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, remote: RemoteKeys
    ) -> None:
        """Attention of q ``[B, S_q, H, D]`` with k, v ``[B, S_kv, H_kv, D]`` and remote ones."""
        module, _ = _extension()
        assert module is not None
        q, k, v = (x.detach() for x in (q, k, v))
        key = (q.dtype, q.shape[3], q.shape[2] // k.shape[2])
        kernel = self._compiled.get(key)
        if kernel is None:
            kernel = self._compiled[key] = module.compile_kernel(q, k, v, out)
        kernel(*module.arguments(q, k, v, out, scale, remote))
