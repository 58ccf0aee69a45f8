"""Stand-ins for the packages that hold attention kernels for GPUs, on CPU tensors."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import swiftfusion_xdit.attention
from swiftfusion_xdit.attention import gpu
from swiftfusion_xdit.attention.cpu import CpuBackend

MODULES = {
    "fa4": "flash_attn.cute.interface",
    "fa3": "flash_attn_interface",
    "fa2": "flash_attn.flash_attn_interface",
}
GPU = torch.device("cuda", 0)


class FakeGpu:
    """A GPU of some compute capability, and which packages are installed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        self._monkeypatch = monkeypatch
        self.calls: list[dict[str, Any]] = []
        for module in (gpu, swiftfusion_xdit.attention):
            monkeypatch.setattr(module, "capability_of", lambda device: capability)
        for module_name in ("flash_attn", "flash_attn_interface"):
            # None makes an import fail as if nothing were there.
            monkeypatch.setitem(sys.modules, module_name, None)
        self.cudnn(None)

    def cudnn(self, version: int | None) -> None:
        self._monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: version is not None)
        self._monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)

    def install(self, name: str, **functions: Any) -> None:
        """Put the package of backend `name` there; by default its kernel notes its calls."""
        module = ModuleType(MODULES[name])
        for function, value in (functions or self._kernels()[name]).items():
            setattr(module, function, value)
        self._monkeypatch.setitem(sys.modules, MODULES[name], module)

    def _kernels(self) -> dict[str, dict[str, Any]]:
        def fa4(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            softmax_scale: float | None = None,
            return_lse: bool = False,
            out: Tensor | None = None,
            lse: Tensor | None = None,
        ) -> tuple[Any, ...]:
            assert return_lse
            result, found = self._compute(q, k, v, softmax_scale, out)
            return (result, found if lse is None else lse.copy_(found), None, None, None)

        def flash_attn_func(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            softmax_scale: float | None = None,
            return_attn_probs: bool = False,
        ) -> Any:
            out, lse = self._compute(q, k, v, softmax_scale, None)
            return (out, lse, None) if return_attn_probs else out

        return {
            "fa4": {"_flash_attn_fwd": fa4},
            "fa3": {"flash_attn_func": flash_attn_func},
            "fa2": {"flash_attn_func": flash_attn_func},
        }

    def _compute(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert scale is not None
        self.calls.append({"q": q, "k": k, "v": v, "out": out})
        return CpuBackend(torch.device("cpu")).forward(q, k, v, scale, out)
