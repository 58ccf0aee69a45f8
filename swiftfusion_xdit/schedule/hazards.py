"""Which steps of other streams each step must follow, from what the steps read and write.

A program's order binds a single thread. With a stream per lane only two things bind: the order
within a stream, and that a step which touches a block comes after the earlier steps that conflict
with it. This derives the second, so no builder has to write it down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from swiftfusion_xdit.schedule.steps import (
    Attend,
    Collect,
    Copy,
    Merge,
    Program,
    Put,
    Release,
    Step,
    Stream,
    Wait,
)


def dependencies(program: Program) -> list[tuple[int, ...]]:
    """Per step: the latest earlier step of each other stream that must be done before it.

    Steps that an earlier step of the same stream has waited for already are left out.
    """
    touched: dict[Hashable, list[tuple[int, bool]]] = defaultdict(list)  # (step, writes)
    waited: dict[Stream, dict[Stream, int]] = defaultdict(dict)
    result: list[tuple[int, ...]] = []
    for index, step in enumerate(program.steps):
        latest: dict[Stream, int] = {}
        for resource, writes in _touches(program, index, step):
            for earlier, wrote in touched[resource]:
                stream = program.steps[earlier].stream
                if (writes or wrote) and stream != step.stream:
                    latest[stream] = max(earlier, latest.get(stream, -1))
            touched[resource].append((index, writes))
        known = waited[step.stream]
        needed = {s: i for s, i in latest.items() if i > known.get(s, -1)}
        known.update(needed)
        result.append(tuple(sorted(needed.values())))
    return result


def _touches(program: Program, index: int, step: Step) -> list[tuple[Hashable, bool]]:
    """The (resource, whether it is written) of a step; inputs are only ever read."""
    touches: list[tuple[Hashable, bool]] = [(block, False) for block in program.reads(step)]
    if isinstance(step, Copy | Wait | Release):
        # A Release gives the slot away: it comes after every reader, like a write.
        touches.append((step.block, True))
    elif isinstance(step, Put) and step.block.tensor == "o":
        touches.append((("finished", step.block.chunk, step.block.heads), False))
    elif isinstance(step, Attend):
        touches += [(("partial", chunk, step.heads), True) for chunk in step.queries]
    elif isinstance(step, Merge):
        for chunk in step.queries:
            touches += [(("partial", chunk, step.heads), False)]
            touches += [(("finished", chunk, step.heads), True)]
    elif isinstance(step, Collect):
        touches.append((("result", step.block.heads), True))
    return touches
