"""Rows as 8-bit floats with a scale each: half the bytes of bf16 between ranks, at a known loss.

A row is the D elements of one head of one token. As it travels:

    | D bytes of float8_e4m3fn | zeros | scale, float32 |

padded so that rows stay aligned. A scale of its own makes a row independent of every other: slots,
puts and relays copy rows as they copy any others, and no calibration is needed. e4m3 has three
bits after the leading one, so an element is off by at most 1/16 of itself, or by 2 ** -10 * scale
where it is less than 2 ** -6 * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_ALIGNMENT_BYTES = 16
_ELEMENT = torch.float8_e4m3fn
_SCALE = torch.float32
_LARGEST = torch.finfo(_ELEMENT).max  # 448


def row_bytes(head_dim: int) -> int:
    """Bytes of a row of ``head_dim`` elements: D + 16 where 16 divides D."""
    used = head_dim * _ELEMENT.itemsize + _SCALE.itemsize
    return -(-used // ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES


def encode(x: Tensor) -> Tensor:
    """Rows as they travel.

    Args:
        x: ``[..., D]``, any strides and floating dtype.

    Returns:
        uint8 ``[..., row_bytes(D)]``, contiguous, fresh memory. A row with a NaN or an infinity
        decodes to NaN throughout.
    """
    head_dim = x.shape[-1]
    values = x.to(_SCALE)
    # A scale is never 0: a row of zeros, or of numbers close to the smallest, still divides.
    smallest = torch.finfo(_SCALE).tiny
    scales = values.abs().amax(dim=-1, keepdim=True).div_(_LARGEST).clamp_(min=smallest)
    rows = x.new_zeros(*x.shape[:-1], row_bytes(head_dim), dtype=torch.uint8)
    rows[..., :head_dim].view(_ELEMENT).copy_(values / scales)
    rows.view(_SCALE)[..., -1:].copy_(scales)
    return rows


def decode(rows: Tensor, *, head_dim: int, dtype: torch.dtype) -> Tensor:
    """What ``encode`` was given, up to its rounding.

    Args:
        rows: uint8 ``[..., row_bytes(head_dim)]``; every row contiguous and at a multiple of 4
            bytes of its storage.

    Returns:
        ``[..., head_dim]`` of ``dtype``, contiguous, fresh memory.
    """
    values = rows[..., :head_dim].view(_ELEMENT).to(_SCALE, memory_format=torch.contiguous_format)
    return values.mul_(rows.view(_SCALE)[..., -1:]).to(dtype)
