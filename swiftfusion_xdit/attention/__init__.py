"""Attention of one rank: local kernels that return (out, lse), and the merge of partial outputs.

`select_backend` names a kernel, `attend` runs it, `merge.merge` joins what several calls computed
for the same queries with different keys. `reference` is the oracle that all of it is tested with.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from .backend import Backend
from .cpu import CpuBackend
from .cudnn import CudnnBackend
from .fa2 import Fa2Backend
from .fa3 import Fa3Backend
from .fa4 import Fa4Backend
from .gpu import capability_of
from .masked import MaskedBackend
from .sdpa_flash import SdpaFlashBackend

__all__ = ["Backend", "MaskedBackend", "attend", "select_backend"]

logger = logging.getLogger(__name__)

_ALL: tuple[type[Backend], ...] = (
    CpuBackend,
    Fa4Backend,
    Fa3Backend,
    CudnnBackend,
    Fa2Backend,
    SdpaFlashBackend,
)
_BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in _ALL}
# What "auto" tries on a type of device, best first, each on the compute capabilities (major
# numbers) on which it deserves its place; None: wherever it runs.
_AUTO: dict[str, tuple[tuple[str, tuple[int, ...] | None], ...]] = {
    "cpu": (("cpu", None),),
    "cuda": (
        ("fa4", (9, 10)),
        ("fa3", (9,)),
        ("cudnn", None),
        ("fa2", None),
        ("sdpa_flash", None),
    ),
}


def select_backend(name: str, device: torch.device | str) -> Backend:
    """The backend called `name`, or for "auto" the best one that is installed and runs on `device`.

    The package that holds the kernel is imported here, not before.

    Raises:
        ValueError: `name` is unknown, or that backend is for another type of device.
        ImportError: the package with the kernel is not installed (ModuleNotFoundError) or broken;
            the message has the command that installs it.
        NotImplementedError: the kernel does not run on this device, or "auto" found none that does.
    """
    device = torch.device(device)
    if name == "auto":
        return _best(device)
    if name not in _BACKENDS:
        known = ", ".join(["auto", *sorted(_BACKENDS)])
        raise ValueError(f"backend must be one of {known}; got {name!r}")
    backend = _BACKENDS[name]
    if backend.device_type != device.type:
        raise ValueError(
            f"backend {name!r} runs on device type {backend.device_type!r}; "
            f"got device type {device.type!r}"
        )
    return backend(device)


def _best(device: torch.device) -> Backend:
    if device.type not in _AUTO:
        raise NotImplementedError(
            f"local attention on device type {device.type!r}: backend 'auto' serves "
            f"{', '.join(sorted(_AUTO))} only"
        )
    reasons = []
    for name, majors in _AUTO[device.type]:
        if majors is not None and capability_of(device)[0] not in majors:
            continue
        try:
            backend = _BACKENDS[name](device)
        except (ImportError, NotImplementedError) as error:
            absent = isinstance(error, (ModuleNotFoundError, NotImplementedError))
            logger.log(logging.DEBUG if absent else logging.WARNING, "not used: %s", error)
            reasons.append(str(error))
        else:
            logger.info("local attention on %s: backend %s", device, name)
            return backend
    raise NotImplementedError(
        f"no attention backend for {device}:" + "".join(f"\n- {reason}" for reason in reasons)
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    backend: Backend,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale * q k^T) v over the keys given, and the log-sum-exp of the scaled scores.

    Args:
        q: `[B, S_q, H, D]`, any strides.
        k, v: `[B, S_kv, H_kv, D]`, any strides, same dtype and device as q; H_kv divides H and
            q head i uses kv head i // (H // H_kv).
        scale: factor of the scores, usually D ** -0.5.
        out: where to write the output, `[B, S_q, H, D]` of any strides and floating dtype, on q's
            device; it must not overlap an input. A backend that `writes_out` stores there itself,
            if `out` has q's dtype and aligned rows; others are followed by a copy. By default
            fresh memory in q's dtype.

    Returns:
        out `[B, S_q, H, D]` and lse `[B, H, S_q]`, fp32, natural log, which is fresh memory.
        Without keys (S_kv = 0) out is 0 and lse is -inf, which `merge` weighs with 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other or the backend.
        NotImplementedError: the backend does not support the dtype or the head dim.
    """
    _check(q, k, v, backend, out)
    if q.numel() == 0 or k.numel() == 0:
        batch, num_rows, num_heads, _ = q.shape
        lse = torch.full((batch, num_heads, num_rows), -math.inf, device=q.device)
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        return out.zero_(), lse
    return backend.forward(q, k, v, scale, out)


def _check(q: Tensor, k: Tensor, v: Tensor, backend: Backend, out: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q, k and v must have 4 dims [B, S, H, D]; {_shapes(q, k, v)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; {_shapes(q, k, v)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have the same batch size and head dim; {_shapes(q, k, v)}")
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads == 0 or num_kv_heads == 0 or q.shape[3] == 0:
        raise ValueError(f"number of heads and head dim must be at least 1; {_shapes(q, k, v)}")
    if num_heads % num_kv_heads != 0:
        raise ValueError(
            f"number of q heads must be a multiple of the number of kv heads: "
            f"{num_heads} % {num_kv_heads} = {num_heads % num_kv_heads}; {_shapes(q, k, v)}"
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
    if out is not None and (out.shape != q.shape or out.device != q.device):
        raise ValueError(
            f"out must have q's shape {tuple(q.shape)} and device {q.device}; "
            f"got {tuple(out.shape)} on {out.device}"
        )
    _check_support(q, backend)


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_support(q: Tensor, backend: Backend) -> None:
    """What one backend may not do and another may."""
    if q.dtype not in backend.dtypes:
        known = ", ".join(sorted(str(dtype) for dtype in backend.dtypes))
        raise NotImplementedError(
            f"attention in {q.dtype} with backend {backend.name!r}; supported: {known}"
        )
    head_dim, multiple = q.shape[3], backend.head_dim_multiple
    if head_dim % multiple != 0 or head_dim > backend.max_head_dim:
        raise NotImplementedError(
            f"attention with head dim {head_dim} and backend {backend.name!r}; supported: "
            f"multiples of {multiple} up to {backend.max_head_dim}"
        )
