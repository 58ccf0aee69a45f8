"""All fused calls of a program as one launch, wave by wave.

A unit keeps a tile until it has attended all keys. So a wave of tiles attends the own keys, then
waits for the next chunk of the heads that its tiles belong to, attends it, and so on; only then
comes the next wave. Whoever waits holds up what follows on its unit.
"""

from __future__ import annotations

import math

from swiftfusion_xdit.schedule.steps import Attend, Block, Program, Wait
from swiftfusion_xdit.simulate.cost import tiles_per_head
from swiftfusion_xdit.simulate.engine import Op, OpGraph
from swiftfusion_xdit.simulate.setting import Setting

MOST_WAVES = 8  # that are told apart; the others are attended together


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
        tiles = {"query_rows": rows, "head_dim": shape.head_dim, "batch": shape.batch}
        total_us = self._costs.attend_us(**tiles, key_rows=keys, num_heads=len(heads))
        num_units, per_head = self._costs.gpu.num_units, max(1, tiles_per_head(**tiles))
        num_waves = max(1, math.ceil(self._costs.waves(**tiles, num_heads=len(heads))))
        for wave in range(min(num_waves, MOST_WAVES)):
            first = wave * num_units // per_head
            stop = math.ceil((wave + 1) * num_units / per_head)
            part = 1.0
            if wave == MOST_WAVES - 1:
                stop, part = len(heads), num_waves - wave
            groups = sorted(set(heads[first:stop]))
            for chunk in reversed(step.keys):
                blocks = [Block(x, chunk, group) for group in groups for x in ("k", "v")]
                arrived = [self._waits[block] for block in blocks if block in self._waits]
                name = f"attend kv[{chunk}] as it arrives, heads {groups[0]} to {groups[-1]}"
                piece = Op(self._program.rank, step.stream, name)
                share = sizes.rows("k", (chunk,)) / max(keys, 1)
                piece.attend_us = total_us * part / num_waves * share
                after = [graph.add(piece, [*after, *arrived])]
        return after[0]
