"""Executes a program on a GPU: puts and flags are stream operations between attention calls.

(Short puts of fused layers are a kernel's, see ``puts.py``.)

Between two attention calls everything a program does is copies, flag writes, flag waits and the
events that order streams. Those are compiled once per plan and input strides, and enqueued by one
call into the native library; the host waits for nothing. ``compute`` is the caller's current
stream; the others are side streams that fork from it and join it within the layer, so inputs and
results follow the usual rules of streams, and the layer can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property

import torch
from torch import Tensor

from swiftfusion_xdit.attention import Backend
from swiftfusion_xdit.comm import Communicator, Flag
from swiftfusion_xdit.comm.stream import StreamCommunicator
from swiftfusion_xdit.device_runtime import scratch
from swiftfusion_xdit.device_runtime.graphs import LayerGraphs, wants_graphs
from swiftfusion_xdit.device_runtime.program import STREAMS, Compiled, Compiler, Strides
from swiftfusion_xdit.native import Native
from swiftfusion_xdit.plan import NUM_PARITIES, Plan
from swiftfusion_xdit.runtime import Layer, LayerRunner
from swiftfusion_xdit.schedule.steps import Put, Wait
from swiftfusion_xdit.simulate.timeline import Event
from swiftfusion_xdit.topology import Link

__all__ = ["DeviceRunner", "SideStreams"]


class SideStreams:
    """The streams of one group on one device, shared by all of its plans."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = [torch.cuda.Stream(device) for _ in STREAMS[1:]]
        self._last = torch.cuda.current_stream(device)

    @cached_property
    def capture(self) -> torch.cuda.Stream:
        """What stands for the current stream while a layer is captured."""
        return torch.cuda.Stream(self._device)

    def enter(self) -> list[torch.cuda.Stream]:
        """The streams of one layer, in the order of ``STREAMS``; the first is the current one.

        Layers share slots, so a layer on another stream than the one before waits for that one.
        Inside a capture nothing runs: whoever replays the graph orders it.
        """
        current = torch.cuda.current_stream(self._device)
        if current != self._last and not torch.cuda.is_current_stream_capturing():
            current.wait_stream(self._last)
            self._last = current
        return [current, *self._side]


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
        layer_graphs: bool | None = None,
    ) -> None:
        """Collective: allocates the plan's symmetric memory on every rank.

        Args:
            layer_graphs: whether layers that come again are repeated as CUDA graphs, see
                ``graphs.wants_graphs``; ranks need not agree.
        """
        assert isinstance(comm, StreamCommunicator), comm
        self.native = native
        self._streams = streams
        self._comm: StreamCommunicator = comm
        self._compiled: dict[tuple[int, Strides], Compiled] = {}
        self.notes = comm.heartbeat
        self.timeout_s = comm.timeout_s
        self._graphs = LayerGraphs() if wants_graphs(plan, layer_graphs) else None
        super().__init__(plan, comm, backend)
        comm.name_flags(self.buffer, self._own_flags())

    def close(self) -> None:
        super().close()  # waits for the device
        self._graphs = None

    def _bind_all(self) -> None:
        """Programs are compiled when the strides of the inputs are known."""

    def reset_flags(self) -> None:
        super().reset_flags()
        for parity in range(NUM_PARITIES):
            for peer, block in self.plan.free_flags[self.rank]:
                if block.tensor == "o":  # its owner says so when it enters a layer
                    flag = self.plan.free_flag(self.rank, peer, block, parity)
                    self._comm.clear(self.buffer, flag)
        torch.cuda.current_stream().synchronize()  # before any peer may put

    def _own_flags(self) -> list[tuple[Flag, int]]:
        """Every flag that this rank waits for, and who signals it, for the watchdog's report."""
        flags = [
            (self.awaited_flag(step, parity), step.peer)
            for parity in range(NUM_PARITIES)
            for step in self.program.steps
            if isinstance(step, Put | Wait)
            and self.plan.message_block(
                step.peer if isinstance(step, Put) else self.rank, step.block
            )
            == step.block
        ]
        for parity in range(NUM_PARITIES):
            for message in self.plan.turn_flags[self.rank]:
                name = f"TURN of {message.last} at rank {message.peer}"
                flags.append((Flag(self.plan.turn_flag(message, parity), name), message.writer))
        return flags

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
        out = self._result_like(q)
        layer = Layer({"q": q, "k": k, "v": v}, out, scale, None)
        self._comm.layer_context = context
        compiled = self._compile_for(layer)
        streams = self._streams.enter()
        if not self._repeat(compiled, layer, streams):
            self._run_parts(compiled, layer, streams)
        for link, num_bytes, num_messages in self._sent:
            self._comm.counters.add(link, num_bytes, num_messages=num_messages)
        self._num_layers += 1
        return out

    def _result_like(self, q: Tensor) -> Tensor:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)

    def _repeat(self, compiled: Compiled, layer: Layer, streams: list[torch.cuda.Stream]) -> bool:
        """Run a layer that has come before by its graph, if there is or can be one."""
        if self._graphs is None or torch.cuda.is_current_stream_capturing():
            return False
        tensors = (*layer.inputs.values(), layer.out)
        key = (id(compiled), layer.scale, *(tensor.data_ptr() for tensor in tensors))
        graph = self._graphs.find(key)
        if graph is None:
            if not self._graphs.is_wanted(key) or not compiled.repeats(layer.scale):
                return False
            captured = [self._streams.capture, *streams[1:]]
            graph = self._graphs.capture(
                key, captured[0], lambda: self._run_parts(compiled, layer, captured)
            )
        graph.replay()
        return True

    def _run_parts(
        self, compiled: Compiled, layer: Layer, streams: list[torch.cuda.Stream]
    ) -> None:
        program, at = compiled.program, 0
        bases = [tensor.data_ptr() for tensor in (*layer.inputs.values(), layer.out)]
        bases += [0] * len(compiled.bases)
        handles = [stream.cuda_stream for stream in streams[: program.num_streams]]
        program.bind(bases[: program.num_bases], handles)
        try:
            for part in compiled.parts:
                if isinstance(part, tuple):
                    program.run(*part)
                    continue
                if part.stream != at:
                    at = part.stream
                    torch.cuda.set_stream(streams[at])
                part(layer)
                for key in part.outputs:
                    program.set_base(compiled.bases[key], layer.finished[key].data_ptr())
        finally:
            torch.cuda.set_stream(streams[0])

    @cached_property
    def _sent(self) -> list[tuple[Link, int, int]]:
        """Per class of link: bytes and messages that one layer puts."""
        sizes: dict[Link, list[int]] = {}
        for step in self.program.steps:
            if isinstance(step, Put):
                link = self._comm.topology.link(self.rank, step.peer)
                slot = self.plan.layouts[step.peer].slot(step.block, 0)
                sizes.setdefault(link, []).append(slot.num_bytes)
        return [(link, sum(each), sum(size > 0 for size in each)) for link, each in sizes.items()]

    def _compile_for(self, layer: Layer) -> Compiled:
        parity = self._num_layers % NUM_PARITIES
        key = (parity, tuple(x.stride() for x in layer.inputs.values()))
        if key not in self._compiled:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a layer can be captured in a graph after two layers of its shape and strides "
                    f"have run; strides {key[1]} have not, for {self.plan.shape}"
                )
            self._compiled[key] = Compiler(self, *key).compile()
            self._load_kernels(self._compiled[key], layer)
        return self._compiled[key]

    def _load_kernels(self, compiled: Compiled, layer: Layer) -> None:
        """Run the layer's kernels once without its flags, on whatever the slots hold.

        Compiling and loading a kernel may wait for the device, and the device, once flags are
        enqueued, may be waiting for a peer that waits for this rank.
        """
        trial = Layer(layer.inputs, torch.empty_like(layer.out), layer.scale, None)
        for part in compiled.parts:
            if not isinstance(part, tuple):
                part.prepare(trial)
        context = self._comm.layer_context
        self._comm.layer_context = f"{context}, before which its kernels are tried without a peer"
        with self.notes.watched():
            torch.cuda.synchronize()
        self._comm.layer_context = context

    def _scratch_bytes(self) -> int:
        return scratch.num_bytes(self.plan) if self.backend.writes_out else 0

    @cached_property
    def _scratch_places(self) -> dict[scratch.Key, scratch.Place]:
        return scratch.places(self.plan, self.rank)

    def scratch(self, kind: str, owner: Hashable) -> Tensor:
        """Memory for what a call gives, if its kernel stores into memory that it is given."""
        place = self._scratch_places[kind, owner]
        start = self.plan.symmetric_bytes + place.offset_bytes
        memory = self.buffer.local[start : start + place.num_bytes]
        return memory.view(place.dtype).view(place.shape)


def _copyable(tensor: Tensor) -> Tensor:
    """Pitched copies need contiguous heads and rows that do not overlap."""
    tensor = tensor.detach()
    if tensor.stride(3) == 1 and 0 not in tensor.stride():
        return tensor
    return tensor.contiguous()
