"""Executes one rank's program: binds every step to memory once, then runs the steps in order."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swiftfusion_xdit import wire
from swiftfusion_xdit.attention import Backend, attend
from swiftfusion_xdit.attention.merge import merge
from swiftfusion_xdit.comm import Communicator, Flag, SymmetricBuffer
from swiftfusion_xdit.exchange import transfers
from swiftfusion_xdit.plan import NUM_PARITIES, Plan
from swiftfusion_xdit.schedule.steps import (
    Attend,
    Block,
    Collect,
    Copy,
    Merge,
    Put,
    Release,
    Step,
    TensorName,
    Wait,
)
from swiftfusion_xdit.simulate.timeline import Event


@dataclass
class Layer:
    """What exists while one layer runs: inputs, also as they travel, partials and results."""

    inputs: dict[str, Tensor]
    out: Tensor
    scale: float
    on_wait: Callable[[], None] | None
    partials: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    finished: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    encoded: dict[str, Tensor] = field(default_factory=dict)


Action = Callable[[Layer], None]
Source = Callable[[Layer], Tensor]


class LayerRunner:
    """Runs the layers of one plan on one rank. Owns the plan's symmetric buffer.

    Consecutive layers alternate between two sets of slots, so a put rarely waits for a reader of
    the layer before.
    """

    def __init__(self, plan: Plan, comm: Communicator, backend: Backend) -> None:
        """Collective: allocates the plan's symmetric memory on every rank."""
        self.plan = plan
        self._comm = comm
        self.backend = backend
        self.rank = comm.rank
        self.program = plan.schedule.programs[comm.rank]
        self._layout = plan.layouts[comm.rank]
        self.buffer: SymmetricBuffer = comm.allocate(
            plan.symmetric_bytes + self._scratch_bytes(), num_flags=plan.num_flags
        )
        if comm.on_stream:
            comm.bind(self.buffer, transfers(plan))
        self._num_layers = 0
        self.reset_flags()
        self._contexts = [f"step {i} ({step})" for i, step in enumerate(self.program.steps)]
        self._bind_all()

    def _scratch_bytes(self) -> int:
        """What the runner needs behind the slots, the same on every rank."""
        return 0

    def close(self) -> None:
        """Collective: gives the symmetric memory back."""
        self._comm.free(self.buffer)

    def reset_flags(self) -> None:
        """Every slot empty and free, as before the first layer. No rank may be inside a layer."""
        for flag in range(self.plan.num_flags):
            self._comm.clear(self.buffer, flag)
        for parity in range(NUM_PARITIES):
            for peer, block in self.plan.free_flags[self.rank]:
                self._comm.preset(self.buffer, self.plan.free_flag(self.rank, peer, block, parity))

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
        """One attention layer.

        Args:
            q, k, v: this rank's rows, of the plan's shape.
            context: names the layer in the report of a wait that fails.
            on_wait: called now and then during waits; what it raises leaves the layer.
            events: where to append one event a step.

        Returns:
            out ``[B, s_q, H, D]``, fresh memory.
        """
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        layer = Layer({"q": q, "k": k, "v": v}, out, scale, on_wait)
        parity = self._num_layers % NUM_PARITIES
        self._comm.begin_layer(self.buffer, context, parity=parity)
        actions = self._actions[parity]
        for index, action in enumerate(actions):
            self._comm.context = f"{context}, {self._contexts[index]}"
            if events is None:
                action(layer)
            else:
                start_us = time.monotonic_ns() / 1e3
                action(layer)
                events.append(self._event(index, start_us))
        self._comm.end_layer(self.buffer)
        self._num_layers += 1
        return out

    def _event(self, index: int, start_us: float) -> Event:
        step = self.program.steps[index]
        name = f"{step.verb} {step.operands()}"
        return Event(self.rank, step.stream, name, start_us, time.monotonic_ns() / 1e3)

    def _bind_all(self) -> None:
        self._actions = [
            [self._bind(step, parity) for step in self.program.steps]
            for parity in range(NUM_PARITIES)
        ]

    def _bind(self, step: Step, parity: int) -> Action:
        bind: dict[type[Step], Callable[..., Action]] = {
            Copy: self._bind_copy,
            Put: self._bind_put,
            Wait: self._bind_wait,
            Release: self._bind_release,
            Attend: self._bind_attend,
            Merge: self._bind_merge,
            Collect: self._bind_collect,
        }
        return bind[type(step)](step, parity)

    def _slot(self, block: Block, parity: int) -> Tensor:
        return self._layout.slot(block, parity).view(self.buffer.local)

    def _own(self, block: Block) -> Source:
        """This rank's own rows of an input, for the heads of a group."""
        name, columns = block.tensor, self.columns(block.tensor, block.heads)
        return lambda layer: layer.inputs[name][:, :, columns]

    def _own_encoded(self, block: Block) -> Source:
        """The same as it lies in slots. An input is encoded once a layer, if any of it is sent."""
        if self.plan.shape.wire == "exact":
            return self._own(block)
        name, columns = block.tensor, self.columns(block.tensor, block.heads)

        def rows(layer: Layer) -> Tensor:
            if name not in layer.encoded:
                layer.encoded[name] = wire.encode(layer.inputs[name])
            return layer.encoded[name][:, :, columns]

        return rows

    def _decoded(self, received: Tensor) -> Source:
        """Rows of slots as attention takes them."""
        shape = self.plan.shape
        if shape.wire == "exact":
            return lambda layer: received
        return lambda layer: wire.decode(received, head_dim=shape.head_dim, dtype=shape.dtype)

    def _source(self, block: Block, parity: int) -> Source:
        """What a put of ``block`` sends."""
        if block.tensor == "o":
            key = (block.chunk, block.heads)
            if self.plan.shape.wire == "exact":
                return lambda layer: layer.finished.pop(key)
            return lambda layer: wire.encode(layer.finished.pop(key))
        if block.chunk == self.rank:
            return self._own_encoded(block)
        received = self._slot(block, parity)
        return lambda layer: received

    def _bind_copy(self, step: Copy, parity: int) -> Action:
        slot, source = self._slot(step.block, parity), self._own_encoded(step.block)

        def copy(layer: Layer) -> None:
            slot.copy_(source(layer))

        return copy

    def awaited_flag(self, step: Put | Wait, parity: int) -> Flag:
        """The flag of this rank's own that a step waits for, with its name in reports."""
        if isinstance(step, Wait):
            index = self.plan.full_flag(self.rank, step.block, parity)
            return Flag(index, f"FULL of {step.block}")
        index = self.plan.free_flag(self.rank, step.peer, step.block, parity)
        return Flag(index, f"FREE of {step.block} at rank {step.peer}")

    def _bind_put(self, step: Put, parity: int) -> Action:
        plan, comm, buffer, peer = self.plan, self._comm, self.buffer, step.peer
        region = plan.layouts[peer].slot(step.block, parity)
        free = self.awaited_flag(step, parity)
        full = plan.full_flag(peer, step.block, parity)
        source = self._source(step.block, parity)

        def put(layer: Layer) -> None:
            comm.wait(buffer, free, peer, on_wait=layer.on_wait)
            comm.put(source(layer), buffer, region, peer)
            comm.signal(buffer, full, peer)

        return put

    def _bind_wait(self, step: Wait, parity: int) -> Action:
        comm, buffer, peer = self._comm, self.buffer, step.peer
        full = self.awaited_flag(step, parity)
        return lambda layer: comm.wait(buffer, full, peer, on_wait=layer.on_wait)

    def _bind_release(self, step: Release, parity: int) -> Action:
        comm, buffer, peer = self._comm, self.buffer, step.peer
        free = self.plan.free_flag(peer, self.rank, step.block, parity)
        return lambda layer: comm.signal(buffer, free, peer)

    def _bind_attend(self, step: Attend, parity: int) -> Action:
        backend, heads = self.backend, step.heads
        queries = self.operand("q", step.queries, heads, parity)
        keys, values = (self._keys(name, step, parity) for name in ("k", "v"))
        rows = self.rows(step.queries)
        if self.program.in_place(step):
            columns = self.columns("o", heads)

            def run_in_place(layer: Layer) -> None:
                out = layer.out[:, :, columns]
                operands = (queries(layer), keys(layer), values(layer))
                attend(*operands, scale=layer.scale, backend=backend, out=out)

            return run_in_place

        def run(layer: Layer) -> None:
            out, lse = attend(
                queries(layer), keys(layer), values(layer), scale=layer.scale, backend=backend
            )
            out = out.contiguous()  # as every kernel makes it: copies know its strides beforehand
            for chunk, where in rows:
                part = (out[:, where], lse[:, :, where] if backend.has_lse else lse)
                layer.partials[chunk, heads].append(part)

        return run

    def columns(self, tensor: TensorName, heads: int) -> slice:
        of_group = self.plan.heads(tensor, heads)
        return slice(of_group.start, of_group.stop)

    def rows(self, chunks: tuple[int, ...]) -> list[tuple[int, slice]]:
        """Where each chunk's rows lie in an operand of several chunks."""
        rows, start = [], 0
        for chunk in chunks:
            stop = start + self.plan.shape.query_lengths[chunk]
            rows.append((chunk, slice(start, stop)))
            start = stop
        return rows

    def operand(
        self, tensor: TensorName, chunks: tuple[int, ...], heads: int, parity: int
    ) -> Source:
        if self.program.from_slots(chunks):
            region = self._layout.operand(tensor, chunks, heads, parity)
            source = self._decoded(region.view(self.buffer.local))
        else:
            source = self._own(Block(tensor, self.rank, heads))
        kv_heads = None if tensor == "q" else self._kv_head_of_each_query_head(heads)
        if kv_heads is None:
            return source
        return lambda layer: source(layer).index_select(2, kv_heads)

    def _keys(self, tensor: TensorName, step: Attend, parity: int) -> Source:
        """The keys or values of a call; a fused one's, which lie in two places, are joined."""
        parts = (step.keys[:-1], step.keys[-1:]) if step.fused else (step.keys,)
        sources = [self.operand(tensor, part, step.heads, parity) for part in parts if part]
        if len(sources) == 1:
            return sources[0]
        return lambda layer: torch.cat([source(layer) for source in sources], dim=1)

    def _kv_head_of_each_query_head(self, heads: int) -> Tensor | None:
        """A kernel's query head i uses kv head i // (H / H_kv): None, or the kv heads spelt out."""
        shape, queries, kvs = self.plan.shape, *(self.plan.heads(x, heads) for x in ("q", "k"))
        shared_by = shape.num_heads // shape.num_kv_heads
        wanted = [query // shared_by - kvs.start for query in queries]
        ratio, rest = divmod(len(queries), len(kvs))
        if rest == 0 and wanted == [i // ratio for i in range(len(queries))]:
            return None
        return torch.tensor(wanted, device=self.buffer.local.device)

    def _bind_merge(self, step: Merge, parity: int) -> Action:
        columns, rank = self.columns("o", step.heads), self.rank

        def run(layer: Layer) -> None:
            for chunk in step.queries:
                partials = layer.partials.pop((chunk, step.heads), None)
                if partials is None:
                    continue  # attended in place
                if chunk == rank:
                    merge(partials, out=layer.out[:, :, columns])
                elif len(partials) == 1:
                    layer.finished[chunk, step.heads] = partials[0][0]
                else:
                    layer.finished[chunk, step.heads] = merge(partials)

        return run

    def _bind_collect(self, step: Collect, parity: int) -> Action:
        rows = self._decoded(self._slot(step.block, parity))
        columns = self.columns("o", step.block.heads)

        def collect(layer: Layer) -> None:
            layer.out[:, :, columns].copy_(rows(layer))

        return collect
