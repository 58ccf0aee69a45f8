"""When a rank may turn to its next peer, so that ranks keep in step.

Ranks put to one peer after another in the same order, so that while they are in step each is put
to by one other. Nothing in a schedule keeps them there. Once a rank is ahead, two put to the same
peer, each at half the rate, while the way into a third is idle, and what is wanted first comes no
earlier than the rest. So where messages are long, a rank turns to its next peer only when what
that peer is sent in the turn before has arrived. Its writer tells the rank that waits.

Only puts of own inputs before anything else of their stream keep turns. Turn n waits only for turn
n - 1 of the layer, and the first for what an earlier layer gives back, so no wait is in a circle.

An arrival is told again only after the wait for the one before, also where a captured layer is
repeated alone. Who tells of it puts nothing before all that it puts to on the stream have given
back all slots of the layer that used them last. One of these is the peer of both messages, which
cannot do so before it has attended with the delayed one, except in `torus` on a ring alone, where
it may give back each message once that is attended. There all put to all, so the rank that waits
is one of them too, and gives back on the stream of its own puts, behind them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from swiftfusion_xdit.schedule.messages import runs
from swiftfusion_xdit.schedule.steps import Block, Program, Put, Schedule, Step


class Message(NamedTuple):
    """Puts that go together, by their ends and the last block."""

    writer: int
    peer: int
    last: Block


def turns(schedule: Schedule) -> dict[Message, Message]:
    """Of each message that begins a turn: the one to its peer that has to arrive before."""
    sent: dict[tuple[str, int, int], list[Message]] = defaultdict(list)  # stream, turn, peer
    for program in schedule.programs:
        for stream, messages in _openings(program).items():
            for turn, message in enumerate(messages):
                sent[stream, turn, message.peer].append(message)
    found = {}
    for (stream, turn, peer), now in sent.items():
        before = sent.get((stream, turn - 1, peer), [])
        if len(now) == len(before) == 1 and now[0].writer != before[0].writer:
            found[now[0]] = before[0]
    return found


def _openings(program: Program) -> dict[str, list[Message]]:
    """By stream: the messages of own inputs that come before anything else there."""
    found: dict[str, list[Message]] = defaultdict(list)
    over: set[str] = set()
    for run in runs(program.steps):
        last = program.steps[run[-1]]
        is_own = all(_is_own_input(program.steps[index], program.rank) for index in run)
        if isinstance(last, Put) and is_own and last.stream not in over:
            found[last.stream].append(Message(program.rank, last.peer, last.block))
        else:
            over.add(last.stream)
    return found


def _is_own_input(step: Step, rank: int) -> bool:
    return isinstance(step, Put) and step.block.tensor != "o" and step.block.chunk == rank
