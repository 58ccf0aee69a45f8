"""Which puts of a schedule go together where both ends take part in a transfer.

One-sided puts need no agreement: a flag tells the reader. Where a transfer needs its receiver
(sends and receives), both ends must enter transfers in an order that never waits in a circle.
Such an order comes from running the schedule once: in each *round* every rank goes on until it
waits for a block that was put in this round or later, and puts what it can on the way.

- Puts of a round need only what earlier rounds brought, so they need nothing of each other: in
  any order, the same on all ranks, or all at once, they cannot wait in a circle.
- Before a rank waits for a block it has itself put everything of that round and of earlier ones.

A *batch* is the puts of one round that serve one head group of each rank in one stage of the
algorithm, on all ranks: what is wanted early is not held up by what is wanted late. Where the links
are so slow that attention hides little of a layer's transfers anyway (the planner says so, see
``planner.bounds.transfers_dominate``), a batch is a whole round, which the links carry at once. A
ring's puts are one round: it goes in its head groups.
"""

from __future__ import annotations

from functools import lru_cache

from swiftfusion_xdit.schedule.steps import Block, Put, Schedule, Wait

Message = tuple[int, int, Block]  # (from rank, to rank, block)


@lru_cache(maxsize=64)
def batches(schedule: Schedule, *, whole_rounds: bool = False) -> tuple[tuple[Message, ...], ...]:
    """Every put of one layer, in batches; within a batch by rank, then in program order.

    Args:
        whole_rounds: all puts of a round are one batch; the same on every rank.

    Raises:
        ValueError: the schedule waits in a circle.
    """
    stage_order = _stage_order(schedule)
    arrived: set[Message] = set()
    positions = [0] * len(schedule.programs)
    result: list[tuple[Message, ...]] = []
    while any(at < len(p.steps) for at, p in zip(positions, schedule.programs, strict=True)):
        by_use: dict[tuple[int, str], list[Message]] = {}
        before = list(positions)
        for program in schedule.programs:
            rank = program.rank
            while positions[rank] < len(program.steps):
                step = program.steps[positions[rank]]
                if isinstance(step, Wait) and (step.peer, rank, step.block) not in arrived:
                    break
                if isinstance(step, Put):
                    use = (step.block.heads % schedule.groups_per_rank, step.stage)
                    if whole_rounds:
                        use = next(iter(by_use), use)
                    by_use.setdefault(use, []).append((rank, step.peer, step.block))
                positions[rank] += 1
        if positions == before:
            raise ValueError(f"schedule {schedule.name!r} on {schedule.mesh} waits in a circle")
        for use in sorted(by_use, key=lambda use: (use[0], stage_order[use[1]])):
            result.append(tuple(by_use[use]))
            arrived.update(by_use[use])
    return tuple(result)


def _stage_order(schedule: Schedule) -> dict[str, tuple[int, str]]:
    """Stages by the first place at which any program puts for them."""
    first: dict[str, tuple[int, str]] = {}
    for program in schedule.programs:
        for index, step in enumerate(program.steps):
            key = (index, step.stage)
            if isinstance(step, Put) and key < first.get(step.stage, (len(program.steps), "")):
                first[step.stage] = key
    return first
