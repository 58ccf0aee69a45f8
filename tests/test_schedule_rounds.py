"""Sends and receives in the order of the batches never wait in a circle, on any mesh."""

from __future__ import annotations

from typing import Any

import pytest

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule import BUILDERS, build
from swiftfusion_xdit.schedule.rounds import Message, batches
from swiftfusion_xdit.schedule.steps import Program, Put, Schedule, Wait
from tests.meshes import meshes_of


def schedules() -> list[Any]:
    cases = []
    for size in (1, 2, 3, 4, 6, 8, 12):
        for mesh in meshes_of(size):
            for name in BUILDERS:
                for groups in (1, 3) if name in ("pipelined", "torus") else (1,):
                    try:
                        build(name, mesh, groups_per_rank=groups)
                    except ValueError:
                        continue  # a mesh that the builder does not serve
                    label = f"{name}-{mesh}-{groups}"
                    cases.append(pytest.param(name, mesh, groups, id=label))
    return cases


@pytest.mark.parametrize("whole_rounds", [False, True])
@pytest.mark.parametrize(("name", "mesh", "groups"), schedules())
def test_every_put_is_in_one_batch(name: str, mesh: Mesh, groups: int, whole_rounds: bool) -> None:
    schedule = build(name, mesh, groups_per_rank=groups)
    puts = [
        (program.rank, step.peer, step.block)
        for program in schedule.programs
        for step in program.steps
        if isinstance(step, Put)
    ]
    found = batches(schedule, whole_rounds=whole_rounds)
    assert sorted(m for batch in found for m in batch) == sorted(puts)


@pytest.mark.parametrize("whole_rounds", [False, True])
@pytest.mark.parametrize(("name", "mesh", "groups"), schedules())
def test_blocking_batches_run_to_the_end(
    name: str, mesh: Mesh, groups: int, whole_rounds: bool
) -> None:
    """Every rank works like one thread: it is inside a batch until all its peers there are, too."""
    schedule = build(name, mesh, groups_per_rank=groups)
    order = batches(schedule, whole_rounds=whole_rounds)
    ranks = [_Rank(program, order) for program in schedule.programs]
    done: set[Message] = set()
    finished_before = -1
    while len(done) > finished_before:
        finished_before = len(done)
        for rank in ranks:
            rank.go_on(done)
        for message in {m for batch in order for m in batch} - done:
            src, dst, _ = message
            if message in ranks[src].entered and message in ranks[dst].entered:
                done.add(message)
    for rank in ranks:
        rank.go_on(done)
        assert rank.at == len(rank.program.steps), f"rank {rank.program.rank} is stuck"


class _Rank:
    """One rank's program, and the batches that it has entered, in order."""

    def __init__(self, program: Program, order: tuple[tuple[Message, ...], ...]) -> None:
        self.program = program
        mine = [[m for m in batch if program.rank in m[:2]] for batch in order]
        self.batches = [batch for batch in mine if batch]
        self.batch_of = {m: i for i, batch in enumerate(self.batches) for m in batch}
        self.next = 0
        self.at = 0
        self.put: set[Message] = set()
        self.entered: set[Message] = set()

    def go_on(self, done: set[Message]) -> None:
        rank = self.program.rank
        self._enter(done)
        while self.at < len(self.program.steps):
            step = self.program.steps[self.at]
            if isinstance(step, Wait):
                message = (step.peer, rank, step.block)
                assert message in self.entered or self._blocked(done), (
                    f"rank {rank} waits for {message} before its own puts of that batch"
                )
                if message not in done:
                    return
            elif isinstance(step, Put):
                self.put.add((rank, step.peer, step.block))
            self.at += 1
            self._enter(done)

    def _blocked(self, done: set[Message]) -> bool:
        """Whether the side stream is still inside an earlier batch."""
        return self.next > 0 and not done.issuperset(self.batches[self.next - 1])

    def _enter(self, done: set[Message]) -> None:
        while self.next < len(self.batches) and not self._blocked(done):
            batch = self.batches[self.next]
            if not all(m in self.put for m in batch if m[0] == self.program.rank):
                return
            self.entered.update(batch)
            self.next += 1


def test_whole_rounds_are_the_same_puts_in_the_same_rounds() -> None:
    schedule = build("torus", Mesh(torus=4))
    apart, whole = batches(schedule), batches(schedule, whole_rounds=True)
    assert len(apart) == 7 and len(whole) == 2  # q and kv of three machines, and o; q, k, v; o
    assert [{m[2].tensor for m in batch} for batch in whole] == [{"q", "k", "v"}, {"o"}]
    assert {m for batch in apart[:-1] for m in batch} == set(whole[0])
    assert batches(build("torus", Mesh(ring=2)), whole_rounds=True) == batches(
        build("torus", Mesh(ring=2))
    )


def test_a_schedule_that_waits_in_a_circle_is_refused() -> None:
    good = build("torus", Mesh(torus=2, ulysses=1, ring=1))
    backwards = tuple(
        Program(p.rank, p.query_order, p.key_order, tuple(reversed(p.steps))) for p in good.programs
    )
    with pytest.raises(ValueError, match="waits in a circle"):
        batches(Schedule("backwards", good.mesh, 1, backwards))
