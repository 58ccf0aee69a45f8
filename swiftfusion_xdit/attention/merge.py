"""Joins attention outputs of the same queries over disjoint sets of keys."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from swiftfusion_xdit.native import Native

logger = logging.getLogger(__name__)


def merge(partials: Sequence[tuple[Tensor, Tensor]], *, out: Tensor | None = None) -> Tensor:
    """The attention output over all keys, from the outputs over parts of the keys.

    Sums in fp32 in the order given, so equal partials in an equal order give equal bits. On a GPU
    that is one kernel on the current stream, if the compiled part is built.

    Args:
        partials: one or more (out `[B, S, H, D]`, lse `[B, H, S]`), any strides; lse is the natural
            log, -inf where a row had no keys. Rows with -inf in every partial become 0.
        out: where to write, `[B, S, H, D]` of any strides and floating dtype; it must not overlap
            a partial. By default fresh memory in the first partial's dtype.

    Returns:
        `out`. It never aliases a partial, also if there is only one.

    Raises:
        ValueError: no partials, or shapes that do not fit.
    """
    _check(partials, out)
    if out is None:
        out = torch.empty_like(partials[0][0], memory_format=torch.contiguous_format)
    if len(partials) == 1:
        return out.copy_(partials[0][0])
    if out.is_cuda and _merge_compiled(partials, out):
        return out
    return _merge_with_torch(partials, out)


def _merge_compiled(partials: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> bool:
    """Whether the compiled part is there and takes these tensors; if so, it has."""
    from swiftfusion_xdit.native import merge_refusal

    compiled = _compiled()
    if compiled is None or merge_refusal(partials, out=out) is not None:
        return False
    compiled.merge(partials, out=out, stream=torch.cuda.current_stream(out.device).cuda_stream)
    return True


@functools.cache
def _compiled() -> Native | None:
    """The compiled part, which only GPUs need; without it, one warning and None."""
    from swiftfusion_xdit.native import NativeUnavailable, load

    try:
        return load()
    except NativeUnavailable as error:
        logger.warning("partial outputs are merged by several torch kernels: %s", error)
        return None


def _merge_with_torch(partials: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> Tensor:
    weights = _weights([lse for _, lse in partials])
    total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    torch.mul(partials[0][0], weights[0], out=total)
    for (partial, _), weight in zip(partials[1:], weights[1:], strict=True):
        total.addcmul_(partial, weight)
    return out if total is out else out.copy_(total)


def _weights(lses: Sequence[Tensor]) -> Tensor:
    """Share of each partial in each row: [num_partials, B, S, H, 1], fp32."""
    # Plainly: weight_i = exp(lse_i) / sum_j exp(lse_j) = exp(lse_i - logaddexp_j(lse_j)).
    # exp(lse) overflows fp32 above 88. softmax subtracts the largest lse first, which cancels out;
    # where that is -inf, it computes -inf - -inf = nan, and the weight is 0 instead.
    stacked = torch.stack([lse.float() for lse in lses])
    weights = torch.softmax(stacked, dim=0)
    weights.masked_fill_(stacked.amax(dim=0) == -math.inf, 0.0)
    return weights.transpose(2, 3).unsqueeze(-1)


def _check(partials: Sequence[tuple[Tensor, Tensor]], out: Tensor | None) -> None:
    if not partials:
        raise ValueError("partials must hold at least one (out, lse); got none")
    shape = partials[0][0].shape
    if len(shape) != 4:
        raise ValueError(f"partial out must have 4 dims [B, S, H, D]; got {tuple(shape)}")
    if out is not None and out.shape != shape:
        raise ValueError(
            f"out must have the partials' shape {tuple(shape)}; got {tuple(out.shape)}"
        )
    if len(partials) == 1:
        return  # its lse has no say, and a kernel without lse gives an empty one
    batch, num_rows, num_heads, _ = shape
    for idx, (partial, lse) in enumerate(partials):
        if partial.shape != shape or lse.shape != (batch, num_heads, num_rows):
            raise ValueError(
                f"partials[{idx}] must be out {tuple(shape)} and lse "
                f"{(batch, num_heads, num_rows)}; got out {tuple(partial.shape)} and lse "
                f"{tuple(lse.shape)}"
            )
