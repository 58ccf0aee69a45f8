"""When a rank may turn to its next peer, so that ranks keep in step.

Ranks put to one peer after another in the same order, so that while they are in step each is put
to by one other. Nothing in a schedule keeps them there. Once a rank is ahead, two put to the same
peer, each at half the rate, while the way into a third is idle, and what is wanted first comes no
earlier than the rest. So where messages are long, a rank turns to its next peer only when the
message that its own sender of the same turn had for it has arrived.

Only puts of own inputs before anything else of their stream keep turns. They wait for nothing but
each other, the later for the earlier, so no wait is in a circle. A rank puts nothing of a layer
before it and all that it puts to are through with the layer that used the same slots last. One of
these is the rank that the delayed message goes to, which needs it: so an arrival is told again only
after the wait for the one before, also where a captured layer is repeated alone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from swiftfusion_xdit.schedule.messages import runs
from swiftfusion_xdit.schedule.steps import Block, Program, Put, Schedule


class Message(NamedTuple):
    """Puts that go together, by their ends and the last block."""

    writer: int
    peer: int
    last: Block


def turns(schedule: Schedule) -> dict[Message, Message]:
    """Of each message that begins a turn: the one to its writer that has to arrive before."""
    openings: dict[str, dict[int, list[Message]]] = defaultdict(dict)
    for program in schedule.programs:
        for stream, messages in _openings(program).items():
            openings[stream][program.rank] = messages
    found = {}
    for by_rank in openings.values():
        for rank, messages in by_rank.items():
            for number in range(1, len(messages)):
                arriving = [
                    theirs[number - 1]
                    for theirs in by_rank.values()
                    if number <= len(theirs) and theirs[number - 1].peer == rank
                ]
                if messages[number].peer == messages[number - 1].peer or len(arriving) != 1:
                    continue
                (before,) = arriving
                peer = messages[number].peer
                if peer in (before.writer, *(other.peer for other in by_rank[before.writer])):
                    found[messages[number]] = before
    return found


def _openings(program: Program) -> dict[str, list[Message]]:
    """By stream: the messages of own inputs that come before anything else there."""
    found: dict[str, list[Message]] = defaultdict(list)
    over: set[str] = set()
    for run in runs(program.steps):
        last = program.steps[run[-1]]
        if (
            isinstance(last, Put)
            and (last.block.tensor != "o" and last.block.chunk == program.rank)
            and last.stream not in over
        ):
            found[last.stream].append(Message(program.rank, last.peer, last.block))
        else:
            over.add(last.stream)
    return found
