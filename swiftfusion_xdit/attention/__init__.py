"""Attention of one rank: local kernels that return (out, lse), and the merge of partial outputs.

`select_backend` names a kernel, `attend` runs it, `merge.merge` joins what several calls computed
for the same queries with different keys. `reference` is the oracle that all of it is tested with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import Backend
from .cpu import CpuBackend

__all__ = ["Backend", "attend", "select_backend"]

_BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (CpuBackend,)}
_AUTO: dict[str, str] = {"cpu": "cpu"}


def select_backend(name: str, device: torch.device | str) -> Backend:
    """The backend called `name`, or for "auto" the best one for `device`.

    Raises:
        ValueError: `name` is unknown, or that backend does not run on `device`.
        NotImplementedError: "auto" for a type of device that no backend serves.
    """
    device_type = torch.device(device).type
    if name == "auto":
        if device_type not in _AUTO:
            raise NotImplementedError(
                f"local attention on device type {device_type!r}: backend 'auto' serves "
                f"{', '.join(sorted(_AUTO))} only"
            )
        name = _AUTO[device_type]
    if name not in _BACKENDS:
        known = ", ".join(["auto", *sorted(_BACKENDS)])
        raise ValueError(f"backend must be one of {known}; got {name!r}")
    backend = _BACKENDS[name]
    if backend.device_type != device_type:
        raise ValueError(
            f"backend {name!r} runs on device type {backend.device_type!r}; "
            f"got device type {device_type!r}"
        )
    return backend()


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q k^T) v over the keys given, and the log-sum-exp of the scaled scores.

    Args:
        q: `[B, S_q, H, D]`, any strides.
        k, v: `[B, S_kv, H_kv, D]`, any strides, same dtype and device as q; H_kv divides H and
            q head i uses kv head i // (H // H_kv).
        scale: factor of the scores, usually D ** -0.5.

    Returns:
        out `[B, S_q, H, D]` in q's dtype and lse `[B, H, S_q]`, fp32, natural log; fresh memory.
        Without keys (S_kv = 0) out is 0 and lse is -inf, which `merge` weighs with 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other or the backend.
        NotImplementedError: the backend does not support the dtype.
    """
    _check(q, k, v, backend)
    if q.numel() == 0 or k.numel() == 0:
        batch, num_rows, num_heads, _ = q.shape
        lse = torch.full((batch, num_heads, num_rows), -math.inf, device=q.device)
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse
    return backend.forward(q, k, v, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, backend: Backend) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q, k and v must have 4 dims [B, S, H, D]; {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same batch size and head dim; {shapes}")
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads == 0 or num_kv_heads == 0 or q.shape[3] == 0:
        raise ValueError(f"number of heads and head dim must be at least 1; {shapes}")
    if num_heads % num_kv_heads != 0:
        raise ValueError(
            f"number of q heads must be a multiple of the number of kv heads: "
            f"{num_heads} % {num_kv_heads} = {num_heads % num_kv_heads}; {shapes}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must have the same dtype; got q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    if not q.device == k.device == v.device or q.device.type != backend.device_type:
        raise ValueError(
            f"q, k and v must be on one device of type {backend.device_type!r} for backend "
            f"{backend.name!r}; got q {q.device}, k {k.device}, v {v.device}"
        )
    if q.dtype not in backend.dtypes:
        known = ", ".join(sorted(str(dtype) for dtype in backend.dtypes))
        raise NotImplementedError(
            f"attention in {q.dtype} with backend {backend.name!r}; supported: {known}"
        )
