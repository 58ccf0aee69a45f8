"""Tensors as the arguments of the kernels, and which tensors the kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swiftfusion_xdit.native.structs import MAX_HEAD_DIM, MAX_PARTIALS, MergeArgs, PackItem

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def merge_refusal(partials: Sequence[tuple[Tensor, Tensor | None]], *, out: Tensor) -> str | None:
    """Why `Native.merge` does not take these tensors, or None if it does."""
    if not 1 <= len(partials) <= MAX_PARTIALS:
        return f"1 to {MAX_PARTIALS} partials, got {len(partials)}"
    shape, dtype = out.shape, partials[0][0].dtype
    if len(shape) != 4 or not 1 <= shape[3] <= MAX_HEAD_DIM:
        return f"out must be [B, S, H, D] with D 1 to {MAX_HEAD_DIM}, got {tuple(shape)}"
    if dtype not in _DTYPES or out.dtype not in _DTYPES:
        return f"dtypes must be bf16, fp16 or fp32, got {dtype} and {out.dtype}"
    if dtype != out.dtype and torch.float32 not in (dtype, out.dtype):
        return f"dtypes must be equal or one of them fp32, got {dtype} and {out.dtype}"
    for i, (partial, lse) in enumerate(partials):
        if partial.shape != shape or partial.dtype != dtype:
            return (
                f"partials[{i}] must be {tuple(shape)} {dtype}, got {tuple(partial.shape)} "
                f"{partial.dtype}"
            )
        if len(partials) == 1:
            continue
        wanted = (shape[0], shape[2], shape[1])
        if lse is None or lse.shape != wanted or lse.dtype != torch.float32:
            got = None if lse is None else f"{tuple(lse.shape)} {lse.dtype}"
            return f"the lse of partials[{i}] must be {wanted} torch.float32, got {got}"
    if any(x.stride(3) != 1 for x in (out, *(partial for partial, _ in partials))):
        return "the last dim must be contiguous in out and in every partial"
    if not all(x.is_cuda for x in (out, *(partial for partial, _ in partials))):
        return "tensors must be on a GPU"
    return None


def merge_args(partials: Sequence[tuple[Tensor, Tensor | None]], *, out: Tensor) -> MergeArgs:
    """The argument of `sf_merge` for tensors that `merge_refusal` has nothing against."""
    args = MergeArgs()
    for i, (partial, lse) in enumerate(partials):
        args.out[i] = partial.data_ptr()
        args.out_stride[i][:] = partial.stride()[:3]
        if lse is not None and len(partials) > 1:
            args.lse[i] = lse.data_ptr()
            args.lse_stride[i][:] = lse.stride()
    args.dst = out.data_ptr()
    args.dst_stride[:] = out.stride()[:3]
    args.num_partials = len(partials)
    args.batch, args.rows, args.heads, args.head_dim = out.shape
    args.in_dtype, args.dst_dtype = _DTYPES[partials[0][0].dtype], _DTYPES[out.dtype]
    return args


def pack_item(index: int, src: Tensor, dst: Tensor) -> PackItem:
    if src.shape != dst.shape or src.dtype != dst.dtype or src.dim() != 4:
        raise ValueError(
            f"pack: pair {index} must be two [B, S, H, D] of one shape and dtype, got "
            f"{tuple(src.shape)} {src.dtype} and {tuple(dst.shape)} {dst.dtype}"
        )
    if src.numel() > 0 and src.shape[3] > 1 and (src.stride(3) != 1 or dst.stride(3) != 1):
        raise ValueError(
            f"pack: the last dim of pair {index} must be contiguous, got strides {src.stride()} "
            f"and {dst.stride()}"
        )
    if not (src.is_cuda and dst.is_cuda):
        raise ValueError(f"pack: pair {index} must be on a GPU, got {src.device} and {dst.device}")
    size = src.element_size()
    item = PackItem(src=src.data_ptr(), dst=dst.data_ptr())
    item.src_stride[:] = [stride * size for stride in src.stride()[:3]]
    item.dst_stride[:] = [stride * size for stride in dst.stride()[:3]]
    item.batch, item.rows, item.heads, item.head_bytes = *src.shape[:3], src.shape[3] * size
    return item
