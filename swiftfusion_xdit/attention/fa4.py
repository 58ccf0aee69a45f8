"""FlashAttention 4: kernels in CuTe DSL, compiled by the package when they are first called.

Once for each dtype, head dim and number of q heads that share a kv head, and whatever the lengths
and strides; some seconds each. `FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1` keeps them on disk.

The package decides afresh at each call which of its kernels to launch, in Python, which takes
longer than short layers do on the GPU. The decision depends on shapes, strides and dtype alone, so
it is left to the package once for each of these, noted, and repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .fa4_fused import FusedLaunches
from .fa4_launch import Launches
from .fused import RemoteKeys
from .gpu import GpuBackend, broken_package, is_readable, load_module, readable

_MODULE = "flash_attn.cute.interface"
_PACKAGE = "flash-attn-4"
_COMMAND = "pip install --upgrade flash-attn-4"
_PARAMETERS = frozenset({"softmax_scale", "return_lse", "out", "lse"})
# Head dims of up to 256 on Hopper; the kernels for other GPUs have few tiles above 128.
_HOPPER = 9


def _absent() -> None:
    """Stands for a function that a version of the package does not have."""


class Fa4Backend(GpuBackend):
    """FlashAttention 4 through the function below its autograd wrapper, which takes an `out`.

    It takes [B, S, H, D] and fewer kv heads as they are. Its lse is [B, H, S], natural log, fp32:
    the kernel keeps row maxima and sums in base 2 and multiplies by ln 2 at the end.
    """

    name: ClassVar[str] = "fa4"
    majors: ClassVar[tuple[int, ...]] = (8, 9, 10, 11, 12)
    writes_out: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.max_head_dim = 256 if self.capability[0] == _HOPPER else 128
        package = {"backend": self.name, "package": _PACKAGE, "command": _COMMAND}
        module = load_module(_MODULE, **package)
        self._kernel: Callable[..., Any] = getattr(module, "_flash_attn_fwd", _absent)
        if not inspect.signature(self._kernel).parameters.keys() >= _PARAMETERS:
            wanted = f"_flash_attn_fwd({', '.join(sorted(_PARAMETERS))})"
            raise broken_package(f"{_MODULE} has no {wanted}", **package)
        self._launches = Launches(self._kernel)
        self._fused_launches = FusedLaunches(device)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self._launches.run(q.detach(), k.detach(), v.detach(), scale, out)

    def launcher(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None] | None:
        if not all(x.numel() and is_readable(x) for x in (q, k, v, out)):
            return None
        return self._launches.find(q, k, v, scale, out, lse)

    def not_fused_because(
        self, *, dtype: torch.dtype, head_dim: int, shared_by: int, tile_rows: int
    ) -> str:
        if self.capability[0] != _HOPPER:
            return f"the kernel that waits for peers runs on Hopper, not on {self.capability}"
        if dtype not in self.dtypes:
            return f"backend {self.name!r} does not attend in {dtype}"
        return self._fused_launches.not_fused_because(
            dtype=dtype, head_dim=head_dim, shared_by=shared_by, tile_rows=tile_rows
        )

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, remote: RemoteKeys
    ) -> None:
        self._fused_launches.run(readable(q), readable(k), readable(v), scale, out, remote)
