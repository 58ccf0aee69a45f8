"""Attention and merge calls of a compiled program: kernels that Python launches.

Where the kernel stores into memory that it is given, its outputs and log-sum-exps have memory of
their own, which all layers of a plan share: layers follow one another. Then nothing but the layer's
inputs and result changes from layer to layer, and all else about a call is made once.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftfusion_xdit.attention import attend
from swiftfusion_xdit.attention.merge import merge
from swiftfusion_xdit.native.structs import MergeArgs
from swiftfusion_xdit.native.tensors import merge_args, merge_refusal
from swiftfusion_xdit.runtime import Layer, Source
from swiftfusion_xdit.schedule.steps import Attend

if TYPE_CHECKING:
    from swiftfusion_xdit.device_runtime import DeviceRunner

Launch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
Output = tuple[int, int]  # finished output of a query chunk, for a head group


class AttendCall:
    """One attention call of one rank's program.

    ``outputs`` are the chunks of others' queries whose only partial this is: finished output.
    """

    def __init__(self, runner: DeviceRunner, step: Attend, parity: int, stream: int) -> None:
        self.stream = stream
        self._runner = runner
        self._heads = step.heads
        self._backend = runner.backend
        self._operands: tuple[Source, ...] = (
            runner.operand("q", step.queries, step.heads, parity),
            runner.operand("k", step.keys, step.heads, parity),
            runner.operand("v", step.keys, step.heads, parity),
        )
        self._rows = runner.rows(step.queries)
        self.in_place = runner.program.in_place(step)
        self._columns = runner.columns("o", step.heads)
        counts = runner.program.num_partials
        self.outputs: list[Output] = [
            (chunk, step.heads)
            for chunk in step.queries
            if not self.in_place and counts[chunk, step.heads] == 1
        ]
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        if self._backend.writes_out:
            self._lse = runner.scratch("lse", step)
            if not self.in_place:
                self._out = runner.scratch("out", step)
        self._parts = None if self._out is None else self._split(self._out, self._lse)
        self._launch: Launch | None = None
        self._scale = 0.0

    def prepare(self, layer: Layer) -> None:
        """Run once, off the record: compiles kernels, and finds out what to launch later."""
        if self._lse is not None:
            q, k, v = (operand(layer) for operand in self._operands)
            out = self._target(layer)
            self._launch = self._backend.launcher(q, k, v, layer.scale, out, self._lse)
            self._scale = layer.scale
        self(layer)

    def repeats(self, scale: float) -> bool:
        """Whether all memory but the layer's own is the same in every call."""
        return self._launch is not None and scale == self._scale

    def __call__(self, layer: Layer) -> None:
        q, k, v = (operand(layer) for operand in self._operands)
        if self._launch is not None and layer.scale == self._scale:
            assert self._lse is not None
            self._launch(q, k, v, self._target(layer), self._lse)
            parts = self._parts
        else:
            target = self._target(layer) if self.in_place or self._out is not None else None
            out, lse = attend(q, k, v, scale=layer.scale, backend=self._backend, out=target)
            if self._lse is not None:  # merges were told of this memory
                self._lse.copy_(lse)
                parts = self._parts
            else:
                # As every kernel makes it: copies know its strides beforehand.
                parts = None if self.in_place else self._split(out.contiguous(), lse)
        for chunk, part in parts or ():
            if (chunk, self._heads) in self.outputs:
                layer.finished[chunk, self._heads] = part[0]
            else:
                layer.partials[chunk, self._heads].append(part)

    def _target(self, layer: Layer) -> Tensor:
        if self.in_place:
            return layer.out[:, :, self._columns]
        assert self._out is not None
        return self._out

    def _split(self, out: Tensor, lse: Tensor | None) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        """The partial of each chunk of queries."""
        assert lse is not None
        by_rows = self._backend.has_lse
        return [
            (chunk, (out[:, rows], lse[:, :, rows] if by_rows else lse))
            for chunk, rows in self._rows
        ]


class MergeCall:
    """Merges the partials of one query chunk: this rank's into its result, others' to be sent."""

    def __init__(self, runner: DeviceRunner, chunk: int, heads: int, stream: int) -> None:
        self.stream = stream
        self._runner = runner
        self._key = (chunk, heads)
        self._is_own = chunk == runner.rank
        self.outputs: list[Output] = [] if self._is_own else [self._key]
        self._columns = runner.columns("o", heads)
        self._out: Tensor | None = None
        if not self._is_own and runner.backend.writes_out:
            self._out = runner.scratch("merged", self._key)
        # Of the partials that this was made for, which are the same ones in every layer.
        self._args: MergeArgs | None = None
        self._offset = 0

    def prepare(self, layer: Layer) -> None:
        partials, out = layer.partials[self._key], self._target(layer)
        if not self._runner.backend.writes_out:
            out = None  # each layer has partials of its own
        if out is not None and merge_refusal(partials, out=out) is None:
            self._args = merge_args(partials, out=out)
            self._offset = out.data_ptr() - layer.out.data_ptr()
        self(layer)

    def repeats(self, scale: float) -> bool:
        """As of an AttendCall."""
        return self._args is not None

    def __call__(self, layer: Layer) -> None:
        partials, out = layer.partials.pop(self._key), self._out
        if self._args is None:
            out = merge(partials, out=self._target(layer))
        else:
            if self._is_own:
                self._args.dst = layer.out.data_ptr() + self._offset
            stream = torch.cuda.current_stream(layer.out.device).cuda_stream
            native = self._runner.native
            native.check(native.library.sf_merge(byref(self._args), stream))
        if not self._is_own:
            assert out is not None
            layer.finished[self._key] = out

    def _target(self, layer: Layer) -> Tensor | None:
        return layer.out[:, :, self._columns] if self._is_own else self._out
