"""Puts to several peers, each on a stream of its own.

A stream moves one block at a time. Where its blocks go to one peer after another, GPUs soon fall
out of step and push to the same peer at once, while the way into others is idle: four H200 that
push to three peers in turn reach 0.6 of what they reach with a stream for each peer
(`benchmarks/peer_copies.py`). Puts to one peer keep their order, which is that of their need.
"""

from __future__ import annotations

from dataclasses import replace

from swiftfusion_xdit.schedule.steps import Program, Put, Step

# Of a stream; with more peers some share one. With two streams for attention there are 8 streams
# then, as many as a GPU has queues by default.
MOST_LANES = 3


def lane_names(stream: str) -> tuple[str, ...]:
    """The streams that take the puts of ``stream``, itself first."""
    return (stream, *(f"{stream}.{lane}" for lane in range(1, MOST_LANES)))


def spread_puts(program: Program) -> Program:
    """The same program with a lane for each peer that a stream puts to, in the order of use."""
    peers: dict[str, list[int]] = {}

    def spread(step: Step) -> Step:
        if not isinstance(step, Put):
            return step
        known = peers.setdefault(step.stream, [])
        if step.peer not in known:
            known.append(step.peer)
        lane = known.index(step.peer) % MOST_LANES
        return replace(step, stream=lane_names(step.stream)[lane])  # type: ignore[arg-type]

    return replace(program, steps=tuple(spread(step) for step in program.steps))
