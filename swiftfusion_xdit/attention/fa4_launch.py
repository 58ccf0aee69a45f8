"""Launches of FlashAttention 4, as its own Python function makes them, without that function.

`flash_attn.cute.interface._flash_attn_fwd` keeps what it has compiled in a table on itself,
`compile_cache`, and ends in a call of one entry. On the first call of its kind that table is
watched: the entry and its arguments are noted, and later calls put their own tensors in the places
of the first one's. Where the function works in another way, nothing is noted and each call goes
through it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_KINDS = 512  # of calls that are remembered
_TABLE = "compile_cache"


@dataclass(frozen=True)
class Launch:
    """A compiled kernel, its arguments, and where among them q, k, v, out and lse are."""

    kernel: Callable[..., Any]
    arguments: tuple[Any, ...]
    places: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> None:
        arguments = list(self.arguments)
        for place, tensor in zip(self.places, tensors, strict=True):
            arguments[place] = tensor
        self.kernel(*arguments)


class Launches:
    """Calls ``function``, or what it was seen to launch for tensors of the same kind.

    A kind is all that the function may decide by: dtype, shapes, strides and scale. Addresses are
    multiples of 16 bytes, see `gpu.readable`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._known: dict[Hashable, Launch | None] = {}

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(out ``[B, S, H, D]``, lse ``[B, H, S]``) of attention without a mask."""
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        batch, rows, heads, _ = q.shape
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
        kind = _kind(q, k, v, scale, out)
        launch = self._known.get(kind)
        if launch is not None:
            launch(q, k, v, out, lse)
        elif kind in self._known:
            self._call(q, k, v, scale, out, lse)
        else:
            self._first(kind, q, k, v, scale, out, lse)
        return out, lse

    def find(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> Launch | None:
        """What is launched for tensors of this kind, if that is known; launches it the first time.

        The function takes q, k, v, out and lse.
        """
        kind = _kind(q, k, v, scale, out)
        if kind not in self._known:
            self._first(kind, q.detach(), k.detach(), v.detach(), scale, out, lse)
        return self._known.get(kind)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        self._function(q, k, v, softmax_scale=scale, return_lse=True, out=out, lse=lse)

    def _first(
        self,
        kind: Hashable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        table = getattr(self._function, _TABLE, None)
        if table is None:
            self._call(q, k, v, scale, out, lse)
            return
        watched = _WatchedTable(table)
        setattr(self._function, _TABLE, watched)
        try:
            self._call(q, k, v, scale, out, lse)
        finally:
            setattr(self._function, _TABLE, table)
        if len(self._known) >= MOST_KINDS:
            self._known.clear()
        self._known[kind] = watched.launch_of(q, k, v, out, lse)


def _kind(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> Hashable:
    return (q.dtype, q.shape, k.shape, q.stride(), k.stride(), v.stride(), out.stride(), scale)


class _WatchedTable:
    """The package's table of compiled kernels; notes which entry is called, and with what."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], bool]] = []

    def __contains__(self, key: Any) -> bool:
        return key in self._table

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self._table[key] = kernel

    def __getitem__(self, key: Any) -> Callable[..., Any]:
        kernel = self._table[key]

        def called(*arguments: Any, **named: Any) -> Any:
            self._calls.append((kernel, arguments, bool(named)))
            return kernel(*arguments, **named)

        return called

    def launch_of(self, *tensors: Tensor) -> Launch | None:
        """The one call that was made, if each of ``tensors``, and no other, was passed once."""
        if len(self._calls) != 1:
            return None
        kernel, arguments, has_named = self._calls[0]
        passed = [idx for idx, value in enumerate(arguments) if isinstance(value, Tensor)]
        places = [[idx for idx in passed if _is_same(arguments[idx], tensor)] for tensor in tensors]
        found = sorted(idx for each in places for idx in each)
        if has_named or found != passed or any(len(each) != 1 for each in places):
            return None
        rest = tuple(None if isinstance(value, Tensor) else value for value in arguments)
        return Launch(kernel, rest, tuple(each[0] for each in places))


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        b.data_ptr(),
        b.shape,
        b.stride(),
        b.dtype,
    )
