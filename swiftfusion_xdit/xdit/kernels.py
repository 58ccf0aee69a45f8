"""xDiT's attention functions as local kernels that see whole sequences.

Sparse and quantised backends choose blocks and scales by what they see. In a mesh without a ring
every rank gives them all rows of its heads in rank order, which is what xDiT's Ulysses gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from swiftfusion_xdit.attention import Backend
from swiftfusion_xdit.attention.backend import deliver

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class XditBackend(Backend):
    """A function of xDiT's registry; ``attention_kwargs`` is set before each layer.

    The function takes ``[b, h, s, d]`` and gives ``(out, lse or None)``.
    """

    dtypes: ClassVar[frozenset[torch.dtype]] = _DTYPES
    has_lse: ClassVar[bool] = False
    whole_sequence: ClassVar[bool] = True

    def __init__(self, name: str, function: Callable[..., Any], device: torch.device) -> None:
        super().__init__(device)
        self.name = f"xdit:{name}"  # type: ignore[misc]
        self.device_type = device.type  # type: ignore[misc]
        self.function = function
        self.attention_kwargs: dict[str, Any] | None = None
        # By name, this rank's heads of what travelled with the queries, a tensor a head group.
        self.extra_inputs: dict[str, list[Tensor]] = {}
        self.num_calls = 0  # in the layer at hand: one a head group

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert math.isclose(scale, q.shape[3] ** -0.5), scale
        repeats = q.shape[2] // k.shape[2]
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        kwargs = self.attention_kwargs
        if self.extra_inputs:
            kwargs = {**(kwargs or {}), **self._extra_inputs()}
        result, _ = self.function(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=0.0,
            is_causal=False,
            attention_kwargs=kwargs,
        )
        return deliver(result.transpose(1, 2), out), q.new_empty(0, dtype=torch.float32)

    def _extra_inputs(self) -> dict[str, Tensor]:
        """Those of the head group at hand: groups come in turn."""
        call, self.num_calls = self.num_calls, self.num_calls + 1
        return {
            name: groups[call % len(groups)].transpose(1, 2)
            for name, groups in self.extra_inputs.items()
        }


class GatherBackend(Backend):
    """Keeps the queries that it is given, in ``groups``; its output is of no use."""

    name: ClassVar[str] = "gather"
    dtypes: ClassVar[frozenset[torch.dtype]] = _DTYPES
    has_lse: ClassVar[bool] = False
    whole_sequence: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.device_type = device.type  # type: ignore[misc]
        self.groups: list[Tensor] = []

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.groups.append(q.clone())
        result = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        return deliver(result, out), q.new_empty(0, dtype=torch.float32)
