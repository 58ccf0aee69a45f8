"""Turns one rank's program into stream operations and the calls between them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from swiftfusion_xdit.comm.stream import StreamBuffer
from swiftfusion_xdit.device_runtime.calls import AttendCall, MergeCall, Output
from swiftfusion_xdit.device_runtime.fused import FusedCall
from swiftfusion_xdit.device_runtime.puts import PutCall, can_put_by_kernel
from swiftfusion_xdit.native import ABSOLUTE, Op, Place, Program
from swiftfusion_xdit.region import Region
from swiftfusion_xdit.schedule.hazards import dependencies
from swiftfusion_xdit.schedule.messages import runs
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
from swiftfusion_xdit.schedule.turns import Message

if TYPE_CHECKING:
    from swiftfusion_xdit.device_runtime import DeviceRunner

STREAMS = ("compute", "compute2", "ring", "torus")
INPUTS = ("q", "k", "v")
ASIDE = 1  # compute2: a stream that waits for peers before it does anything else
OUT = 3  # bases: q, k, v, the result, then finished outputs
Strides = tuple[tuple[int, ...], ...]
Call = AttendCall | MergeCall | PutCall | FusedCall
_Flagged = TypeVar("_Flagged", Put, Release)


@dataclass
class Compiled:
    """A program for one parity and set of input strides."""

    program: Program
    parts: list[tuple[int, int] | Call]  # a range of operations, or a call
    bases: dict[Output, int]  # where finished outputs stand in the table of addresses

    def repeats(self, scale: float) -> bool:
        """Whether layers of this scale differ in nothing but the addresses of inputs and result."""
        return all(part.repeats(scale) for part in self.parts if not isinstance(part, tuple))


class Compiler:
    """Turns one rank's program into native operations, for one parity and set of strides."""

    def __init__(self, runner: DeviceRunner, parity: int, strides: Strides) -> None:
        self.runner = runner
        self.plan = runner.plan
        self.parity = parity
        self.strides = dict(zip(INPUTS, strides, strict=True))
        self.program = runner.program
        # Then everything follows one another on one stream.
        self.puts_by_kernel = can_put_by_kernel(self.plan, runner.rank)
        self.aside = 0 if self.puts_by_kernel else ASIDE
        assert isinstance(runner.buffer, StreamBuffer)
        self.buffer = runner.buffer
        self.ops: list[Op] = []
        self.parts: list[tuple[int, int] | Call] = []
        self.num_events = 0
        self.offered = 0  # the event after which this layer's output slots are offered
        self.outputs: dict[Output, _Array] = {}
        self.waited: set[tuple[int, Block]] = set()  # messages, by stream
        self.unreleased = Counter(
            self.plan.message_block(runner.rank, step.block)
            for step in self.program.steps
            if isinstance(step, Release)
        )

    def compile(self) -> Compiled:
        steps = self.program.steps
        needed = [()] * len(steps) if self.puts_by_kernel else dependencies(self.program)
        recorded_after = {index for indices in needed for index in indices}
        events: dict[int, int] = {}
        self._fork()
        self._begin()
        for run in runs(steps):
            for index in run:
                for earlier in needed[index]:
                    self._wait_event(steps[index], events[earlier])
            self._run([steps[index] for index in run])
            for index in run:
                if index in recorded_after:
                    events[index] = self._record(self._stream(steps[index]))
        self._join()
        self._cut()
        program = self.runner.native.program(self.ops)
        bases = {key: array.at.base for key, array in self.outputs.items()}
        return Compiled(program, self.parts, bases)

    def _run(self, steps: list[Step]) -> None:
        (first, *_) = steps
        if isinstance(first, Put):
            if not self.puts_by_kernel:  # else all go with the fused call
                self._put([step for step in steps if isinstance(step, Put)])
        elif isinstance(first, Attend):
            if not first.fused:
                self._attend(first)
            elif first == self.program.fused_calls[0]:
                self._fused(first)
        elif isinstance(first, Merge):
            self._merge(first)
        else:
            self._step(first)

    def _stream(self, step: Step) -> int:
        return 0 if self.puts_by_kernel else STREAMS.index(step.stream)

    def _cut(self) -> None:
        """Operations so far go out together, before what follows."""
        ranges = [part for part in self.parts if isinstance(part, tuple)]
        begin = ranges[-1][1] if ranges else 0
        if begin < len(self.ops):
            self.parts.append((begin, len(self.ops)))

    def _call(self, call: Call, rows: int) -> None:
        """Add a call whose outputs lie in memory with that many rows."""
        self._cut()
        self.parts.append(call)
        for chunk, heads in call.outputs:
            shape = self._rows_of(Block("o", chunk, heads))
            base = OUT + 1 + len(self.outputs)
            strides = _contiguous((shape[0], rows, *shape[2:]))
            self.outputs[chunk, heads] = _Array(Place(base, 0), shape, strides)

    def _attend(self, step: Attend) -> None:
        stream, lengths = self._stream(step), self.plan.shape.query_lengths
        call = AttendCall(self.runner, step, self.parity, stream)
        self._call(call, sum(lengths[chunk] for chunk in step.queries))

    def _fused(self, step: Attend) -> None:
        """All fused calls in one launch, once own rows fill up the tile that holds two ranks'.

        Every put of the layer has been enqueued by now, or goes by a kernel right in front: this
        one keeps the GPU to itself until its peers have sent theirs, which wait for nothing of it.
        """
        stream, rank = self._stream(step), self.runner.rank
        call = FusedCall(self.runner, self.parity, stream, behind_puts=self.puts_by_kernel)
        for tensor in ("k", "v"):
            array = self._at(rank, self.plan.layouts[rank].array(tensor, self.parity))
            batch, rows, heads, dim = array.shape
            shape = (batch, call.own_rows, heads, dim)
            skipped = (rows - call.own_rows) * array.strides[1] * self.plan.shape.dtype.itemsize
            place = Place(ABSOLUTE, array.at.offset + skipped)
            source = _Array(Place(INPUTS.index(tensor), 0), shape, self.strides[tensor])
            self._local_copy(stream, source, _Array(place, shape, array.strides))
        if self.puts_by_kernel:
            self._call(PutCall(self.runner, self.parity, self.strides, stream), 0)
        self._call(call, 0)

    def _merge(self, step: Merge) -> None:
        """Partials are merged by a kernel; a single one needs none, and goes home by a copy."""
        stream = self._stream(step)
        for chunk in step.queries:
            key = (chunk, step.heads)
            if self.runner.program.num_partials[key] > 1:
                call = MergeCall(self.runner, *key, stream)
                self._call(call, self.plan.shape.query_lengths[chunk])
            elif chunk == self.runner.rank and key in self.outputs:
                result = self._result(Block("o", chunk, step.heads))
                self._local_copy(stream, self.outputs[key], result)

    def _side_streams(self) -> list[int]:
        return sorted({self.aside, *map(self._stream, self.program.steps)} - {0})

    def _fork(self) -> None:
        event = self._record(0)
        for stream in self._side_streams():
            self.ops.append(Op.wait_event(stream, event))

    def _begin(self) -> None:
        """Note the layer; take the slots that this rank's inputs go to; offer its own slots.

        Readers have freed slots of inputs in the layer before the last, so nothing is waited for
        where peers keep up, and no put waits at a time when its peer waits for the put. Slots of
        outputs are free once their owner is here, and are needed late: offering them now keeps
        that off the end of the layer.
        """
        # First, so that the watchdog looks while the layer's own stream waits.
        self._note(self.aside, self.runner.notes.begin_notes())
        taken = defaultdict(list)
        for step in self._message_ends(Put):
            back = self.plan.return_block(self.runner.rank, step.peer, step.block)
            if step.block.tensor != "o" and step.block == back:
                taken[self._stream(step)].append(self._own_flag(step))
        for stream, flags in taken.items():
            self.ops += [Op.wait(stream, flag) for flag in flags]
            self.ops += [Op.clear(stream, flag) for flag in flags]
        for release in self._message_ends(Release):
            if release.block.tensor == "o":
                self._release(self.aside, release.block, release.peer)
        self.offered = self._record(self.aside)

    def _message_ends(self, kind: type[_Flagged]) -> Iterator[_Flagged]:
        """Steps of one kind, one for each message."""
        for step in self.program.steps:
            if isinstance(step, kind):
                owner = step.peer if isinstance(step, Put) else self.runner.rank
                if self.plan.message_block(owner, step.block) == step.block:
                    yield step

    def _join(self) -> None:
        """The layer ends when all streams are done: inputs and outputs may be freed after it."""
        for stream in self._side_streams():
            self.ops.append(Op.wait_event(0, self._record(stream)))
        self._note(0, self.runner.notes.end_notes())

    def _note(self, stream: int, notes: Iterable[tuple[int, int]]) -> None:
        for address, value in notes:
            self.ops.append(Op.write(stream, Place(ABSOLUTE, address), value=value))

    def _record(self, stream: int) -> int:
        event = self.num_events
        self.num_events += 1
        self.ops.append(Op.record(stream, event))
        return event

    def _wait_event(self, step: Step, event: int) -> None:
        self.ops.append(Op.wait_event(self._stream(step), event))

    def _put(self, steps: list[Put]) -> None:
        """One message, when it is its turn: all copies, then its flags.

        FREE is cleared before FULL tells the peer that it may give the slots back.
        """
        plan, parity = self.plan, self.parity
        stream, end = self._stream(steps[0]), steps[-1]
        message = Message(self.runner.rank, end.peer, end.block)
        if end.block.tensor == "o":
            free = self._own_flag(end)
            self.ops += [Op.wait(stream, free), Op.clear(stream, free)]
        if message in plan.turns:
            turn = self._turn_flag(plan.turns[message])
            self.ops += [Op.wait(stream, turn), Op.clear(stream, turn)]
        for step in steps:
            slot = plan.layouts[end.peer].slot(step.block, parity)
            self._copy(stream, self._source(step.block), self._at(end.peer, slot))
        full = plan.full_flag(end.peer, end.block, parity)
        self.ops.append(Op.write(stream, self._flag_place(full, end.peer)))
        if message in plan.next_writers:
            self.ops.append(Op.write(stream, self._turn_flag(message)))

    def _turn_flag(self, message: Message) -> Place:
        """What tells the next writer to the peer of a message that it has arrived there."""
        flag = self.plan.turn_flag(message, self.parity)
        return self._flag_place(flag, self.plan.next_writers[message])

    def _step(self, step: Step) -> None:
        rank, plan, parity = self.runner.rank, self.plan, self.parity
        stream = self._stream(step)
        if isinstance(step, Copy):
            own = plan.layouts[rank].slot(step.block, parity)
            self._local_copy(stream, self._input(step.block), self._at(rank, own))
        elif isinstance(step, Wait):
            if step.block not in self.program.awaited_in_kernels:
                self._wait(stream, step)
        elif isinstance(step, Release):
            # Its stream is by now behind the readers of every block of the message.
            block = plan.message_block(rank, step.block)
            self.unreleased[block] -= 1
            in_kernel = step.block in self.program.awaited_in_kernels
            if not self.unreleased[block] and block.tensor != "o" and not in_kernel:
                self._release(stream, block, step.peer)
        else:
            assert isinstance(step, Collect), step
            slot = plan.layouts[rank].slot(step.block, parity)
            self._local_copy(stream, self._at(rank, slot), self._result(step.block))

    def _wait(self, stream: int, step: Wait) -> None:
        """Wait for the message that brings a block, if this stream has not.

        FULL stays set until the release: nobody else looks at it before, and clearing it here would
        hold up the reader.
        """
        block = self.plan.message_block(self.runner.rank, step.block)
        if (stream, block) not in self.waited:
            self.waited.add((stream, block))
            if block.tensor == "o" and stream != self.aside:
                # Until the slot is offered, FULL is still that of the layer before the last.
                self.ops.append(Op.wait_event(stream, self.offered))
            self.ops.append(Op.wait(stream, self._own_flag(replace(step, block=block))))

    def _release(self, stream: int, block: Block, peer: int) -> None:
        """Give the slots of a message back to ``peer``."""
        rank, plan, parity = self.runner.rank, self.plan, self.parity
        full = plan.full_flag(rank, block, parity)
        free = plan.free_flag(peer, rank, block, parity)
        self.ops.append(Op.clear(stream, self._flag_place(full, rank)))
        self.ops.append(Op.write(stream, self._flag_place(free, peer)))

    def _own_flag(self, step: Put | Wait) -> Place:
        flag = self.runner.awaited_flag(step, self.parity)
        return self._flag_place(flag.index, self.runner.rank)

    def _flag_place(self, flag: int, rank: int) -> Place:
        return Place(ABSOLUTE, self.buffer.flag_address(flag, rank))

    def _local_copy(self, stream: int, src: _Array, dst: _Array) -> None:
        """Inside a GPU CUDA copies by a kernel too, a launch each and at half the rate of ours."""
        self._copy(stream, src, dst, by_kernel=True)

    def _copy(self, stream: int, src: _Array, dst: _Array, *, by_kernel: bool = False) -> None:
        self.ops += Op.copies(
            stream,
            src.at,
            dst.at,
            shape=src.shape,
            src_stride=src.strides,
            dst_stride=dst.strides,
            itemsize=self.plan.shape.dtype.itemsize,
            by_kernel=by_kernel,
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
            return self.outputs[block.chunk, block.heads]
        if block.chunk == self.runner.rank:
            return self._input(block)
        rank = self.runner.rank
        return self._at(rank, self.plan.layouts[rank].slot(block, self.parity))

    def _result(self, block: Block) -> _Array:
        shape = self.plan.shape
        rows = self._rows_of(block)
        strides = _contiguous((shape.batch, rows[1], shape.num_heads, shape.head_dim))
        first = self.plan.heads("o", block.heads).start * shape.head_dim * shape.dtype.itemsize
        return _Array(Place(OUT, first), rows, strides)


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
