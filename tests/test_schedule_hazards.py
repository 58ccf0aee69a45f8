"""Streams with the derived dependencies keep every order that a program's blocks need."""

from __future__ import annotations

import random

import pytest

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.schedule.hazards import dependencies
from swiftfusion_xdit.schedule.steps import Attend, Block, Merge, Program, Put, Release, Wait
from tests.meshes import meshes_of


def random_order(program: Program, rng: random.Random) -> list[int]:
    """One order that streams and dependencies allow."""
    needed = dependencies(program)
    queues: dict[str, list[int]] = {}
    for index, step in enumerate(program.steps):
        queues.setdefault(step.stream, []).append(index)
    done: set[int] = set()
    order: list[int] = []
    while len(order) < len(program.steps):
        ready = [q for q in queues.values() if q and set(needed[q[0]]) <= done]
        assert ready, "streams wait for each other in a circle"
        index = rng.choice(ready).pop(0)
        done.add(index)
        order.append(index)
    return order


def assert_data_is_there(program: Program, order: list[int]) -> None:
    held: set[Block] = set()
    waited: set[Block] = set()
    partials: dict[tuple[int, int], int] = {}
    merged: set[tuple[int, int]] = set()
    total: dict[tuple[int, int], int] = {}
    for step in program.steps:
        if isinstance(step, Attend):
            for chunk in step.queries:
                key = (chunk, step.heads)
                total[key] = total.get(key, 0) + 1
    for index in order:
        step = program.steps[index]
        for block in program.reads(step):
            own = block.chunk == program.rank and block.tensor != "o"
            assert own or block in held, f"{step} reads {block} too early or too late"
        if isinstance(step, Wait):
            held.add(step.block)
            waited.add(step.block)
        elif isinstance(step, Release):
            assert step.block in waited
            held.discard(step.block)
        elif isinstance(step, Attend):
            for chunk in step.queries:
                partials[chunk, step.heads] = partials.get((chunk, step.heads), 0) + 1
        elif isinstance(step, Merge):
            for chunk in step.queries:
                assert partials[chunk, step.heads] == total[chunk, step.heads], step
                merged.add((chunk, step.heads))
        elif isinstance(step, Put) and step.block.tensor == "o":
            assert (step.block.chunk, step.block.heads) in merged, step


@pytest.mark.parametrize("mesh", [*meshes_of(4), *meshes_of(8), Mesh(3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("name", "groups"), [("torus", 1), ("folded", 1), ("pipelined", 2), ("usp", 1)]
)
def test_any_order_that_streams_allow(mesh: Mesh, name: str, groups: int) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        for program in build(name, mesh, groups_per_rank=groups).programs:
            order = random_order(program, rng)
            assert_data_is_there(program, order)


def test_puts_of_inputs_need_nothing() -> None:
    program = build("torus", Mesh(2, 1, 2)).programs[0]
    needed = dependencies(program)
    for index, step in enumerate(program.steps):
        if isinstance(step, Put) and step.block.chunk == 0 and step.block.tensor != "o":
            assert needed[index] == ()
