"""Which puts go together: one flag says that all of them have arrived.

A schedule has a flag for each block. Where flags cost time, as between GPUs, blocks that follow
one another to the same peer, in one stage and for one head group, share that of the last: it is set
when all of them are there, and given back when all have been read. Both ends derive this from the
writer's program.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator

from swiftfusion_xdit.schedule.steps import Program, Put, Step


def runs(steps: tuple[Step, ...]) -> Iterator[list[int]]:
    """Indices of the steps in order, those of puts that go together in one list."""

    def kind(index: int) -> Hashable:
        step = steps[index]
        if not isinstance(step, Put):
            return index
        return step.stream, step.peer, step.stage, step.block.heads, step.block.tensor == "o"

    for _, run in itertools.groupby(range(len(steps)), kind):
        yield list(run)


def messages(program: Program) -> Iterator[list[Put]]:
    """The puts of one program, those that go together in one list."""
    for run in runs(program.steps):
        puts = [step for step in (program.steps[index] for index in run) if isinstance(step, Put)]
        if puts:
            yield puts
