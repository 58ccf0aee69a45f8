"""All fused calls of a program as one launch, wave by wave on parts of the GPU.

A unit keeps a tile until it has attended all keys. So a wave of tiles attends the own keys, then
waits for the next chunk of the heads that its tiles belong to, attends it, and so on; only then
comes the next wave. Whoever waits holds up what follows on its unit, and nobody else: the units are
told apart by ``PARTS``, and those that take up the first heads, which come first, go on first.
"""

from __future__ import annotations

import math

from swiftfusion_xdit.schedule.steps import Attend, Block, Program, Wait
from swiftfusion_xdit.simulate.cost import worked_rows
from swiftfusion_xdit.simulate.engine import Op, OpGraph
from swiftfusion_xdit.simulate.setting import Setting

MOST_WAVES = 4  # that are told apart; the others are attended together
PARTS = 4  # of a GPU's units


class FusedLaunch:
    """Collects the waits and calls of one program; the last call adds the launch."""

    def __init__(self, program: Program, setting: Setting) -> None:
        self._program = program
        self._sizes = setting.sizes
        self._costs = setting.costs
        self._waits: dict[Block, Op] = {}

    def wait(self, step: Wait) -> Op:
        """A wait inside the kernel: nothing but the launch follows it."""
        op = self._waits[step.block] = Op(self._program.rank, step.stream, str(step))
        return op

    def add(self, graph: OpGraph, step: Attend, after: list[Op]) -> Op:
        """One call; returns what follows it on its stream."""
        calls = self._program.fused_calls
        if step != calls[-1]:
            return graph.add(Op(self._program.rank, step.stream, str(step), drawn=False), after)
        shape, sizes = self._sizes.shape, self._sizes
        heads = [call.heads for call in calls for _ in range(sizes.num_heads("q", call.heads))]
        rows, keys = sizes.rows("q", step.queries), sizes.rows("k", step.keys)
        per_head = worked_rows(query_rows=rows, head_dim=shape.head_dim, fused=True) * shape.batch
        per_wave = self._costs.rows_per_wave(shape.head_dim)
        num_waves = math.ceil(per_head * len(heads) / per_wave)
        wave_us = self._costs.wave_us(key_rows=keys, head_dim=shape.head_dim)
        launch = Op(self._program.rank, step.stream, str(step), drawn=False)
        graph.add(launch, after)
        ends = []
        for part in range(PARTS):
            last = launch
            for wave in range(min(num_waves, MOST_WAVES)):
                turn = wave * PARTS + part
                first = turn * per_wave // (PARTS * per_head)
                stop = math.ceil((turn + 1) * per_wave / (PARTS * per_head))
                waves = 1
                if wave == MOST_WAVES - 1:
                    stop, waves = len(heads), num_waves - wave
                groups = sorted(set(heads[first:stop]))
                if not groups:
                    break
                for chunk in reversed(step.keys):
                    blocks = [Block(x, chunk, group) for group in groups for x in ("k", "v")]
                    arrived = [self._waits[block] for block in blocks if block in self._waits]
                    name = f"attend kv[{chunk}] as it arrives, heads {groups[0]} to {groups[-1]}"
                    piece = Op(self._program.rank, f"{step.stream}, part {part}", name)
                    piece.width = 1 / PARTS
                    piece.attend_us = wave_us * waves * sizes.rows("k", (chunk,)) / max(keys, 1)
                    if last is launch:
                        piece.attend_us += self._costs.gpu.kernel_us
                    last = graph.add(piece, [last, *arrived])
            ends.append(last)
        return graph.add(Op(self._program.rank, step.stream, str(step), drawn=False), ends)
