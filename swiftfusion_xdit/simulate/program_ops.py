"""A schedule's programs as operations for the engine: streams, blocks, flags, batches.

An operation follows the one before it on its stream, the steps of other streams that share its
blocks (`schedule/hazards.py`), and what flags order: a Wait the put that fills its slot, a put the
Release that emptied its slot two layers before. One-sided puts run on the stream that they are on.
Two-sided ones go to a stream of their own in batches, which both ends enter together, one after
another. Fused calls are one launch (`simulate/fused_ops.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from swiftfusion_xdit.schedule.hazards import dependencies
from swiftfusion_xdit.schedule.steps import (
    Attend,
    Block,
    Collect,
    Copy,
    Merge,
    Program,
    Put,
    Release,
    Step,
    Wait,
)
from swiftfusion_xdit.simulate.batches import add_batches
from swiftfusion_xdit.simulate.engine import Op, OpGraph
from swiftfusion_xdit.simulate.fused_ops import FusedLaunch
from swiftfusion_xdit.simulate.setting import Layer, Setting
from swiftfusion_xdit.simulate.transport import FUSED_LAYER_US
from swiftfusion_xdit.topology import Link as LinkClass

NUM_PARITIES = 2  # even and odd layers have slots of their own


class GraphBuilder:
    """Builds the graph of consecutive layers."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.graph = OpGraph()
        self.layers: list[Layer] = []

    def add_layer(self) -> None:
        layer = Layer()
        before = self.layers[-1] if self.layers else None
        for program in self.setting.wiring.programs:
            rank = program.rank
            after = [before.ends[rank]] if before else []
            begin = self.graph.add(Op(rank, "compute", "layer", drawn=False), after)
            if not self.setting.free_links:
                begin.delay_us = max(self.setting.inside.layer_us, self.setting.across.layer_us)
                if program.fused_calls:
                    begin.delay_us = min(begin.delay_us, FUSED_LAYER_US)
            self._barrier(begin)
            layer.begins[rank] = begin
            self._add_program(program, layer, begin)
        add_batches(self.graph, self.setting, layer)
        self._end(layer)
        for message, op in layer.waits:
            self.graph.order(layer.flows[message], op)
        self._order_free(layer)
        self.layers.append(layer)

    def _barrier(self, begin: Op) -> None:
        """A dissemination barrier: log2(ranks) rounds of the longest latency."""
        setting = self.setting
        if setting.across.barriers and not setting.free_links:
            link = setting.cluster.across or setting.cluster.inside
            begin.delay_us += math.ceil(math.log2(setting.cluster.num_ranks)) * link.latency_us
            begin.name, begin.drawn = "barrier", True

    def _add_program(self, program: Program, layer: Layer, begin: Op) -> None:
        last: dict[str, Op] = {}
        ops: list[Op] = []
        partials: dict[tuple[int, int], int] = {}
        launch = FusedLaunch(program, self.setting)
        two_sided = self.setting.inside.two_sided or self.setting.across.two_sided
        for step, needed in zip(program.steps, dependencies(program), strict=True):
            if two_sided and step.stream == "compute2":  # they run on the caller's stream alone
                step = replace(step, stream="compute")
            after = [last.get(step.stream, begin), *(ops[index] for index in needed)]
            if isinstance(step, Put):
                op = self._put(program, step, layer, after)
            elif isinstance(step, Wait) and step.block in program.awaited_in_kernels:
                op = self.graph.add(launch.wait(step), [begin])
                self._note_flags(program, step, op, layer)
                ops.append(op)
                continue  # its stream does not wait
            elif isinstance(step, Attend) and step.fused:
                op = launch.add(self.graph, step, after)
            else:
                op = self._local(program, step, partials)
                self.graph.add(op, after)
                self._note_flags(program, step, op, layer)
            ops.append(op)
            last[step.stream] = op
        end = Op(program.rank, "compute", "end", drawn=False)
        layer.ends[program.rank] = self.graph.add(end, list(last.values()))

    def _end(self, layer: Layer) -> None:
        """A layer ends with its last transfer; a slot is given back after it was handed on."""
        for (src, dst, block), flow in layer.flows.items():
            self.graph.order(flow, layer.ends[src])
            relayed = block.tensor != "o" and block.chunk != src
            if relayed and flow is not layer.posted[src, dst, block]:
                self.graph.order(flow, layer.releases[src, block])
        for end in layer.ends.values():
            self._barrier(end)

    def _local(self, program: Program, step: Step, partials: dict[tuple[int, int], int]) -> Op:
        sizes, costs = self.setting.sizes, self.setting.costs
        shape = sizes.shape
        op = Op(program.rank, step.stream, str(step))
        if isinstance(step, Attend):
            for chunk in step.queries:
                key = (chunk, step.heads)
                partials[key] = partials.get(key, 0) + 1
            tiles: dict[str, Any] = {
                "query_rows": sizes.rows("q", step.queries),
                "num_heads": sizes.num_heads("q", step.heads),
                "head_dim": shape.head_dim,
                "batch": shape.batch,
            }
            op.attend_us = costs.attend_us(**tiles, key_rows=sizes.rows("k", step.keys))
            op.width = costs.width(**tiles)
        elif isinstance(step, Copy | Collect):
            self._kernel(op, self.setting.own_passes * costs.copy_us(sizes.block_bytes(step.block)))
        elif isinstance(step, Merge):
            self._kernel(op, self._merge_us(program.rank, step, partials))
        return op

    def _kernel(self, op: Op, total_us: float) -> None:
        """A kernel that shares the GPU with attention, after its launch."""
        op.delay_us = min(total_us, self.setting.costs.gpu.kernel_us)
        op.attend_us, op.attends = total_us - op.delay_us, False

    def _merge_us(self, rank: int, step: Merge, partials: dict[tuple[int, int], int]) -> float:
        sizes, costs = self.setting.sizes, self.setting.costs
        total = 0.0
        for chunk in step.queries:
            num_partials = partials.get((chunk, step.heads), 0)  # none: a fused call's, in place
            num_bytes = sizes.block_bytes(Block("o", chunk, step.heads))
            if num_partials > 1:
                rows = sizes.shape.batch * sizes.rows("q", (chunk,))
                total += costs.merge_us(
                    out_bytes=num_bytes,
                    num_partials=num_partials,
                    lse_rows=rows * sizes.num_heads("q", step.heads),
                )
            elif num_partials and chunk == rank:
                total += costs.copy_us(num_bytes)
        return total

    def _put(self, program: Program, step: Put, layer: Layer, after: list[Op]) -> Op:
        """The put's turn on its stream; one-sided, that is the transfer itself."""
        rank = program.rank
        message = (rank, step.peer, step.block)
        link = self.setting.link(rank, step.peer)
        transport = self.setting.transport(link)
        op = Op(rank, step.stream, str(step), drawn=not transport.two_sided)
        if not transport.two_sided:
            op.num_bytes = self.setting.sizes.block_bytes(step.block)
            op.links = self.setting.fabric.links(rank, step.peer, link)
            op.ends = (rank, self.setting.wiring.standing_for(step.peer))
            op.under_compute = transport.under_compute
            op.delay_us = self.setting.start_us(link)
            if link is LinkClass.SAME_MACHINE:
                op.engine = ("copy engine", rank)
            layer.flows[message] = op
        layer.posted[message] = self.graph.add(op, after)
        return op

    def _note_flags(self, program: Program, step: Step, op: Op, layer: Layer) -> None:
        wiring, rank = self.setting.wiring, program.rank
        if isinstance(step, Wait):
            layer.waits.append((wiring.message(step.peer, rank, step.block), op))
        elif isinstance(step, Release):
            layer.released[wiring.message(step.peer, rank, step.block)] = op
            layer.releases[rank, step.block] = op

    def _order_free(self, layer: Layer) -> None:
        """A slot is written again two layers later, after its Release."""
        if len(self.layers) < NUM_PARITIES:
            return
        earlier = self.layers[-NUM_PARITIES]
        for message, release in earlier.released.items():
            self.graph.order(release, layer.flows[message])
