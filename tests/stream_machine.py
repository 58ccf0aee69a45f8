"""GPUs, streams and a native library that exist in Python alone: compiled programs on CPU memory.

Each rank has in-order streams. The host enqueues, as it does for a GPU, and a scheduler then runs
whatever is ready in a random order: any order that real streams of real GPUs may take. Addresses
are those of CPU tensors, so a copy or a flag that goes astray does so here too.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swiftfusion_xdit.attention.cpu import CpuBackend
from swiftfusion_xdit.attention.fused import CHUNK_BITS, RemoteKeys
from swiftfusion_xdit.attention.merge import merge
from swiftfusion_xdit.native import Op
from swiftfusion_xdit.native.ops import OpKind
from swiftfusion_xdit.native.structs import MergeArgs, PutArgs, PutItem

Ready = Callable[[], bool]
NAN = float("nan")


@dataclass(frozen=True)
class FakeStream:
    """As much of ``torch.cuda.Stream`` as the runtime asks for."""

    cuda_stream: int

    def synchronize(self) -> None:
        """The host waits for nothing here: the machine runs when it is drained."""


@dataclass
class Machine:
    """The streams of every rank, and the order in which they get on."""

    seed: int
    queues: dict[int, deque[tuple[str, Ready, Callable[[], None]]]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    current: FakeStream = FakeStream(0)
    captured: list[Callable[[], None]] | None = None  # what a capture under way has got so far
    puts: dict[int, list[bool]] = field(default_factory=dict)  # by stream: is the last put over?
    aliases: dict[int, int] = field(default_factory=dict)  # streams of a capture, in a replay

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        """``torch.cuda.stream``."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def submit(self, enqueue: Callable[[], None]) -> None:
        """The host enqueues something, or adds it to the capture that is under way."""
        if self.captured is not None:
            self.captured.append(enqueue)
        else:
            enqueue()

    def enqueue(self, stream: int, name: str, run: Callable[[], None], ready: Ready) -> None:
        self.queues[self.aliases.get(stream, stream)].append((name, ready, run))

    def drain(self) -> None:
        """Run until every stream is empty.

        Raises:
            AssertionError: streams wait for each other.
        """
        rng = random.Random(self.seed)
        while busy := [stream for stream, queue in self.queues.items() if queue]:
            ready = [stream for stream in busy if self.queues[stream][0][1]()]
            assert ready, {stream: self.queues[stream][0][0] for stream in busy}
            # One of them for a while: real streams run far ahead of one another.
            stream = rng.choice(ready)
            for _ in range(rng.choice((1, 1, 2, 8))):
                if not self.queues[stream] or not self.queues[stream][0][1]():
                    break
                self.queues[stream].popleft()[2]()


class FakeGraph:
    """``torch.cuda.CUDAGraph``: enqueues again what was enqueued while it was captured."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._enqueued: list[Callable[[], None]] = []
        self._stream = FakeStream(0)

    def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
        self._machine.captured, self._stream = self._enqueued, self._machine.current

    def capture_end(self) -> None:
        self._machine.captured = None

    def replay(self) -> None:
        machine = self._machine
        machine.aliases = {self._stream.cuda_stream: machine.current.cuda_stream}
        for enqueue in self._enqueued:
            enqueue()
        machine.aliases = {}


class FakeProgram:
    """Enqueues operations of csrc/swiftfusion.h."""

    def __init__(self, machine: Machine, ops: Sequence[Op]) -> None:
        self.machine, self.ops = machine, list(ops)
        self.num_bases = 1 + max(max(op.src_base, op.dst_base) for op in self.ops)
        self.num_streams = 1 + max(op.stream for op in self.ops)
        self._recorded: dict[int, list[bool]] = {}

    def bind(self, bases: Sequence[int], streams: Sequence[int]) -> None:
        assert len(bases) == self.num_bases and len(streams) == self.num_streams
        self._bases, self._streams = list(bases), list(streams)

    def set_base(self, index: int, address: int) -> None:
        self._bases[index] = address

    def run(self, begin: int, end: int) -> None:
        for op in self.ops[begin:end]:
            src, dst = (
                offset if base < 0 else self._bases[base] + offset
                for base, offset in ((op.src_base, op.src_offset), (op.dst_base, op.dst_offset))
            )
            stream = self._streams[op.stream]
            self.machine.submit(partial(self._enqueue, op, src, dst, stream))

    def _enqueue(self, op: Op, src: int, dst: int, stream: int) -> None:
        kind = OpKind(op.kind)
        run, ready = self._meaning(op, kind, src, dst)
        self.machine.enqueue(stream, f"{kind.name} {src:#x}", run, ready)

    def _meaning(
        self, op: Op, kind: OpKind, src: int, dst: int
    ) -> tuple[Callable[[], None], Ready]:
        if kind in (OpKind.COPY, OpKind.COPY_KERNEL):
            assert all(self._bases[base] for base in (op.src_base, op.dst_base) if base >= 0)
            return lambda: _copy(op, src, dst), lambda: True
        if kind in (OpKind.WRITE, OpKind.CLEAR):
            value = op.value if kind == OpKind.WRITE else 0
            return lambda: setattr(word(dst), "value", value), lambda: True
        if kind == OpKind.WAIT:
            return lambda: None, lambda: word(src).value == op.value
        if kind == OpKind.RECORD:
            done = self._recorded[op.event] = [False]
            return lambda: done.__setitem__(0, True), lambda: True
        done = self._recorded[op.event]  # the record that was enqueued last
        return lambda: None, lambda: done[0]


def word(address: int) -> Any:
    """A flag."""
    return ctypes.c_uint32.from_address(address)


def _copy(op: Op, src: int, dst: int) -> None:
    for plane in range(op.depth):
        for row in range(op.height):
            ctypes.memmove(
                dst + plane * op.dst_plane + row * op.dst_pitch,
                src + plane * op.src_plane + row * op.src_pitch,
                op.width,
            )


class FakeNative:
    """The native library's programs and merges."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.library = self

    def program(self, ops: Sequence[Op]) -> FakeProgram:
        return FakeProgram(self.machine, ops)

    def sf_merge(self, reference: Any, stream: int) -> int:
        args = MergeArgs.from_buffer_copy(reference._obj)
        enqueue = self.machine.enqueue
        self.machine.submit(lambda: enqueue(stream, "merge", lambda: _merge(args), lambda: True))
        return 0

    def put(self, args: PutArgs, *, stream: int) -> None:
        self.machine.submit(partial(self._put, PutArgs.from_buffer_copy(args), stream))

    def _put(self, args: PutArgs, stream: int) -> None:
        """Starts in the order of its stream, goes on beside it, and is over when all is there."""
        machine, over, has_started = self.machine, [False], [False]
        stream = machine.aliases.get(stream, stream)
        machine.puts[stream] = over
        machine.enqueue(stream, "put", partial(has_started.__setitem__, 0, True), lambda: True)
        beside = -1000 - stream
        machine.enqueue(beside, "put starts", lambda: None, lambda: has_started[0])
        for item in args.items[: args.num_items]:
            for peer in range(args.num_peers):
                machine.enqueue(beside, "put", partial(_put_item, item, peer), lambda: True)
        machine.enqueue(beside, "put ends", partial(over.__setitem__, 0, True), lambda: True)

    def check(self, status: int) -> None:
        assert status == 0


def _put_item(item: PutItem, peer: int) -> None:
    for batch, row, head in itertools.product(
        range(item.batch), range(item.rows), range(item.heads)
    ):
        src, dst = (
            sum(i * step for i, step in zip((batch, row, head), strides, strict=True))
            for strides in (item.src_stride, item.dst_stride)
        )
        ctypes.memmove(item.dst[peer] + dst, item.src + src, item.head_bytes)
    if item.flag[peer]:
        word(item.flag[peer]).value = 1


def _merge(args: MergeArgs) -> None:
    shape = (args.batch, args.rows, args.heads, args.head_dim)
    partials = [
        (
            tensor_at(args.out[i], shape, (*args.out_stride[i], 1)),
            tensor_at(args.lse[i], (shape[0], shape[2], shape[1]), tuple(args.lse_stride[i])),
        )
        for i in range(args.num_partials)
    ]
    merge(partials, out=tensor_at(args.dst, shape, (*args.dst_stride, 1)))


def tensor_at(address: int, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """float32 at an address."""
    count = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    memory = (ctypes.c_char * (4 * count)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).as_strided(tuple(shape), tuple(stride))


class StreamedBackend(CpuBackend):
    """Attention that is enqueued, and stores into what it is given."""

    writes_out = True

    def __init__(self, machine: Machine) -> None:
        super().__init__(torch.device("cpu"))
        self.machine = machine

    def launcher(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]:
        def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
            def run() -> None:
                result, found = self.forward(q, k, v, scale)
                out.copy_(result)
                lse.copy_(found)

            stream, enqueue = self.machine.current.cuda_stream, self.machine.enqueue
            self.machine.submit(lambda: enqueue(stream, "attend", run, lambda: True))

        return launch

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, remote: RemoteKeys
    ) -> None:
        """Begins at once, reads each head of a chunk as soon as its flag is set, then ends."""
        stream = self.machine.current.cuda_stream
        self.machine.submit(partial(self._enqueue_fused, stream, q, k, v, scale, out, remote))

    def _enqueue_fused(
        self,
        stream: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        out: Tensor,
        remote: RemoteKeys,
    ) -> None:
        stream, heads = self.machine.aliases.get(stream, stream), k.shape[2]
        keys, values = (x.new_full((len(x), remote.num_keys, *x.shape[2:]), NAN) for x in (k, v))
        rows = remote.num_rows
        like = k.new_empty((len(k), rows, *k.shape[2:]))
        tile_rows = rows // len(remote.begins)
        received = [
            tensor_at(address, like.shape, like.stride()).unflatten(1, (-1, tile_rows))
            for address in (remote.k, remote.v)
        ]

        def read(tiles: slice, head: slice) -> None:
            for whole, each in zip((keys, values), received, strict=True):
                part = whole[:, :rows].view(each.shape)[:, tiles, :, head]
                part.copy_(each[:, tiles, :, head])

        def begin() -> None:
            keys[:, rows:], values[:, rows:] = k, v

        clears, frees = remote.clears.tolist(), remote.frees.tolist()
        self.machine.enqueue(stream, "fused begins", begin, lambda: True)
        stop = len(remote.begins)
        waits = [(tile, entry) for tile, entry in enumerate(remote.begins.tolist()) if entry]
        for tile, entry in reversed(waits):
            first, count = entry % (1 << CHUNK_BITS), entry >> CHUNK_BITS
            start = max([at for at, _ in waits if at < tile], default=-1) + 1
            for head in range(heads):
                flags = remote.flags[first : first + count, head, 0].tolist()

                def ready(flags: list[int] = flags) -> bool:
                    return all(word(flag).value for flag in flags)

                def run(tiles: slice = slice(start, stop), head: int = head) -> None:
                    read(tiles, slice(head, head + 1))

                self.machine.enqueue(stream, "fused waits", run, ready)
            stop = start
        if stop:
            self.machine.enqueue(
                stream, "fused", lambda: read(slice(0, stop), slice(None)), lambda: True
            )

        def end() -> None:
            out.copy_(self.forward(q, keys, values, scale)[0])
            for flags, value in ((clears, 0), (frees, 1)):
                for flag in flags:
                    word(flag).value = value

        over = self.machine.puts[stream] if remote.behind_puts else [True]
        self.machine.enqueue(stream, "fused ends", end, lambda: over[0])
