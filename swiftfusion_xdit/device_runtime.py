"""Executes a program on a GPU: puts and flags are stream operations between attention calls.

Between two attention calls everything a program does is copies, flag writes, flag waits and the
events that order streams. Those are compiled once per plan and input strides, and enqueued by one
call into the native library; the host waits for nothing. ``compute`` is the caller's current
stream; ``ring`` and ``torus`` are side streams that fork from it and join it within the layer, so
inputs and results follow the usual rules of streams, and the layer can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from swiftfusion_xdit.attention import Backend
from swiftfusion_xdit.comm import Communicator, Flag
from swiftfusion_xdit.comm.stream import StreamBuffer
from swiftfusion_xdit.native import ABSOLUTE, Native, Op, Place, Program
from swiftfusion_xdit.plan import NUM_PARITIES, Plan
from swiftfusion_xdit.region import Region
from swiftfusion_xdit.runtime import Action, Layer, LayerRunner
from swiftfusion_xdit.schedule.hazards import dependencies
from swiftfusion_xdit.schedule.steps import (
    Attend,
    Block,
    Collect,
    Copy,
    Merge,
    Put,
    Release,
    Step,
    Wait,
)
from swiftfusion_xdit.simulate.timeline import Event
from swiftfusion_xdit.topology import Link

STREAMS = ("compute", "ring", "torus")
INPUTS = ("q", "k", "v")
OUT = 3  # bases: q, k, v, the result, then finished outputs
Strides = tuple[tuple[int, ...], ...]


class SideStreams:
    """The streams of one group on one device, shared by all of its plans."""

    def __init__(self, device: torch.device) -> None:
        self.ring = torch.cuda.Stream(device)
        self.torus = torch.cuda.Stream(device)
        self._last = torch.cuda.current_stream(device)

    def enter(self) -> list[int]:
        """Handles of compute (the caller's current stream), ring and torus, for one layer.

        Layers share slots, so a layer on another stream than the one before waits for that one.
        Inside a capture nothing runs: whoever replays the graph orders it.
        """
        current = torch.cuda.current_stream(self.ring.device)
        if current != self._last and not torch.cuda.is_current_stream_capturing():
            current.wait_stream(self._last)
            self._last = current
        return [current.cuda_stream, self.ring.cuda_stream, self.torus.cuda_stream]


@dataclass
class _Compiled:
    """A program for one parity and set of input strides."""

    program: Program
    parts: list[tuple[int, int] | Action]  # a range of operations, or an attention or merge
    outputs: list[tuple[int, int]] = field(default_factory=list)  # (chunk, heads) by base


class DeviceRunner(LayerRunner):
    """Runs the layers of one plan on one GPU. Owns the plan's symmetric buffer."""

    def __init__(
        self,
        plan: Plan,
        comm: Communicator,
        backend: Backend,
        *,
        native: Native,
        streams: SideStreams,
    ) -> None:
        """Collective: allocates the plan's symmetric memory on every rank."""
        self._native = native
        self._streams = streams
        self._compiled: dict[tuple[int, Strides], _Compiled] = {}
        super().__init__(plan, comm, backend)
        comm.name_flags(self.buffer, self._own_flags())

    def _bind_all(self) -> None:
        """Programs are compiled when the strides of the inputs are known."""

    def reset_flags(self) -> None:
        super().reset_flags()
        torch.cuda.current_stream().synchronize()  # before any peer may put

    def _own_flags(self) -> list[tuple[Flag, int]]:
        """Every flag that this rank waits for, and who signals it, for the watchdog's report."""
        return [
            (self._awaited_flag(step, parity), step.peer)
            for parity in range(NUM_PARITIES)
            for step in self._program.steps
            if isinstance(step, Put | Wait)
        ]

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        context: str = "",
        on_wait: Callable[[], None] | None = None,
        events: list[Event] | None = None,
    ) -> Tensor:
        if events is not None:
            raise NotImplementedError("recording the events of a layer on a GPU")
        q, k, v = (_copyable(tensor) for tensor in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        layer = Layer({"q": q, "k": k, "v": v}, out, scale, None)
        compiled = self._compile_for(q, k, v)
        bases = [q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()]
        bases += [0] * len(compiled.outputs)
        num_bases, handles = compiled.program.num_bases, self._streams.enter()
        handles = handles[: compiled.program.num_streams]
        self._comm.begin_layer(self.buffer, context, parity=self._num_layers % NUM_PARITIES)
        for part in compiled.parts:
            if isinstance(part, tuple):
                compiled.program.run(*part, bases[:num_bases], handles)
                continue
            part(layer)
            for base, key in enumerate(compiled.outputs, OUT + 1):
                if bases[base] == 0 and key in layer.finished:
                    finished = layer.finished[key] = layer.finished[key].contiguous()
                    bases[base] = finished.data_ptr()
        self._comm.end_layer(self.buffer)
        for link, num_bytes, num_messages in self._sent:
            self._comm.counters.add(link, num_bytes, num_messages=num_messages)
        self._num_layers += 1
        return out

    @cached_property
    def _sent(self) -> list[tuple[Link, int, int]]:
        """Per class of link: bytes and messages that one layer puts."""
        sizes: dict[Link, list[int]] = {}
        for step in self._program.steps:
            if isinstance(step, Put):
                link = self._comm.topology.link(self._rank, step.peer)
                slot = self.plan.layouts[step.peer].slot(step.block, 0)
                sizes.setdefault(link, []).append(slot.num_bytes)
        return [(link, sum(each), sum(size > 0 for size in each)) for link, each in sizes.items()]

    def _compile_for(self, q: Tensor, k: Tensor, v: Tensor) -> _Compiled:
        parity = self._num_layers % NUM_PARITIES
        key = (parity, (q.stride(), k.stride(), v.stride()))
        if key not in self._compiled:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a layer can be captured in a graph after two layers of its shape and strides "
                    f"have run; strides {key[1]} have not, for {self.plan.shape}"
                )
            self._compiled[key] = _Compiler(self, *key).compile()
            self._load_kernels(self._compiled[key], q, k, v)
        return self._compiled[key]

    def _load_kernels(self, compiled: _Compiled, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Run the layer's kernels once without its flags, on whatever the slots hold.

        Compiling and loading a kernel may wait for the device, and the device, once flags are
        enqueued, may be waiting for a peer that waits for this rank.
        """
        layer = Layer({"q": q, "k": k, "v": v}, torch.empty_like(q), 1.0, None)
        for part in compiled.parts:
            if not isinstance(part, tuple):
                part(layer)
        torch.cuda.synchronize()


class _Compiler:
    """Turns one rank's program into native operations, for one parity and set of strides."""

    def __init__(self, runner: DeviceRunner, parity: int, strides: Strides) -> None:
        self.runner = runner
        self.plan = runner.plan
        self.parity = parity
        self.strides = dict(zip(INPUTS, strides, strict=True))
        self.program = runner._program
        assert isinstance(runner.buffer, StreamBuffer)
        self.buffer = runner.buffer
        self.ops: list[Op] = []
        self.outputs: list[tuple[int, int]] = []
        self.num_events = 0

    def compile(self) -> _Compiled:
        steps = self.program.steps
        needed = dependencies(self.program)
        recorded_after = {index for indices in needed for index in indices}
        events: dict[int, int] = {}
        parts: list[tuple[int, int] | Action] = []
        begin = 0
        self._fork(steps)
        for index, step in enumerate(steps):
            for earlier in needed[index]:
                self._wait_event(step, events[earlier])
            if isinstance(step, Attend | Merge):
                if begin < len(self.ops):
                    parts.append((begin, len(self.ops)))
                begin = len(self.ops)
                parts.append(self.runner._bind(step, self.parity))
            else:
                self._step(step)
            if index in recorded_after:
                events[index] = self._record(STREAMS.index(step.stream))
        self._join(steps)
        parts.append((begin, len(self.ops)))
        program = self.runner._native.program(self.ops)
        return _Compiled(program, parts, self.outputs)

    def _side_streams(self, steps: tuple[Step, ...]) -> list[int]:
        return sorted({STREAMS.index(step.stream) for step in steps} - {0})

    def _fork(self, steps: tuple[Step, ...]) -> None:
        event = self._record(0)
        for stream in self._side_streams(steps):
            self.ops.append(Op.wait_event(stream, event))

    def _join(self, steps: tuple[Step, ...]) -> None:
        """Inputs and outputs may be freed after the layer: the side streams are done by then."""
        for stream in self._side_streams(steps):
            event = self._record(stream)
            self.ops.append(Op.wait_event(0, event))

    def _record(self, stream: int) -> int:
        event = self.num_events
        self.num_events += 1
        self.ops.append(Op.record(stream, event))
        return event

    def _wait_event(self, step: Step, event: int) -> None:
        self.ops.append(Op.wait_event(STREAMS.index(step.stream), event))

    def _step(self, step: Step) -> None:
        rank, plan, parity = self.runner._rank, self.plan, self.parity
        stream = STREAMS.index(step.stream)
        if isinstance(step, Copy):
            own = plan.layouts[rank].slot(step.block, parity)
            self._copy(stream, self._input(step.block), self._at(rank, own))
        elif isinstance(step, Put):
            peer, block = step.peer, step.block
            self._flag_wait(stream, plan.free_flag(rank, peer, block, parity))
            slot = plan.layouts[peer].slot(block, parity)
            self._copy(stream, self._source(block), self._at(peer, slot))
            self._flag_write(stream, plan.full_flag(peer, block, parity), peer)
        elif isinstance(step, Wait):
            self._flag_wait(stream, plan.full_flag(rank, step.block, parity))
        elif isinstance(step, Release):
            flag = plan.free_flag(step.peer, rank, step.block, parity)
            self._flag_write(stream, flag, step.peer)
        else:
            assert isinstance(step, Collect), step
            slot = plan.layouts[rank].slot(step.block, parity)
            self._copy(stream, self._at(rank, slot), self._result(step.block))

    def _flag_wait(self, stream: int, flag: int) -> None:
        address = self.buffer.flag_address(flag, self.runner._rank)
        self.ops.append(Op.wait_clear(stream, Place(ABSOLUTE, address)))

    def _flag_write(self, stream: int, flag: int, peer: int) -> None:
        address = self.buffer.flag_address(flag, peer)
        self.ops.append(Op.write(stream, Place(ABSOLUTE, address)))

    def _copy(self, stream: int, src: _Array, dst: _Array) -> None:
        self.ops += Op.copies(
            stream,
            src.at,
            dst.at,
            shape=src.shape,
            src_stride=src.strides,
            dst_stride=dst.strides,
            itemsize=self.plan.shape.dtype.itemsize,
        )

    def _at(self, rank: int, region: Region) -> _Array:
        address = self.buffer.address(rank) + region.offset_bytes
        return _Array(Place(ABSOLUTE, address), region.shape, region.stride)

    def _rows_of(self, block: Block) -> tuple[int, int, int, int]:
        shape = self.plan.shape
        heads = self.plan.heads(block.tensor, block.heads)
        rows = shape.lengths(block.tensor)[block.chunk]
        return (shape.batch, rows, len(heads), shape.head_dim)

    def _input(self, block: Block) -> _Array:
        strides = self.strides[block.tensor]
        first = self.plan.heads(block.tensor, block.heads).start * strides[2]
        offset = first * self.plan.shape.dtype.itemsize
        return _Array(Place(INPUTS.index(block.tensor), offset), self._rows_of(block), strides)

    def _source(self, block: Block) -> _Array:
        """What a put of ``block`` sends: a merged output, an input, or a received block."""
        if block.tensor == "o":
            base = OUT + 1 + len(self.outputs)
            self.outputs.append((block.chunk, block.heads))
            shape = self._rows_of(block)
            return _Array(Place(base, 0), shape, _contiguous(shape))
        if block.chunk == self.runner._rank:
            return self._input(block)
        rank = self.runner._rank
        return self._at(rank, self.plan.layouts[rank].slot(block, self.parity))

    def _result(self, block: Block) -> _Array:
        shape = self.plan.shape
        rows = self._rows_of(block)
        strides = _contiguous((shape.batch, rows[1], shape.num_heads, shape.head_dim))
        first = self.plan.heads("o", block.heads).start * shape.head_dim * shape.dtype.itemsize
        return _Array(Place(OUT, first), rows, strides)


def _copyable(tensor: Tensor) -> Tensor:
    """Pitched copies need contiguous heads and rows that do not overlap."""
    if tensor.stride(3) == 1 and 0 not in tensor.stride():
        return tensor
    return tensor.contiguous()


@dataclass(frozen=True)
class _Array:
    """A strided ``[B, S, H, D]`` array; strides in elements."""

    at: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous array."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
