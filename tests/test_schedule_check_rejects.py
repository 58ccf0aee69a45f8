"""The checker rejects broken schedules and names the step. Each test breaks a proved one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule import Schedule, ScheduleError, build, check
from swiftfusion_xdit.schedule.steps import (
    Attend,
    Block,
    Collect,
    Copy,
    Merge,
    Put,
    Release,
    Step,
    Wait,
)

Edit = Callable[[list[Step]], None]


def edited(edit: Edit, *, rank: int = 0, name: str = "torus") -> Schedule:
    """Torus 2 x ulysses 1 x ring 2 with one rank's steps edited in place."""
    schedule = build(name, Mesh(2, 1, 2))
    programs = list(schedule.programs)
    steps = list(programs[rank].steps)
    edit(steps)
    programs[rank] = replace(programs[rank], steps=tuple(steps))
    return replace(schedule, programs=tuple(programs))


def find(steps: list[Step], kind: type, *, nth: int = 0, **fields: object) -> int:
    """Index of the nth step of a kind whose fields (or block fields) have these values."""

    def matches(step: Step) -> bool:
        block = getattr(step, "block", None)
        return isinstance(step, kind) and all(
            getattr(step, key, getattr(block, key, None)) == value for key, value in fields.items()
        )

    return [i for i, step in enumerate(steps) if matches(step)][nth]


def assert_rejected(edit: Edit, message: str, *, rank: int = 0) -> None:
    with pytest.raises(ScheduleError, match=message):
        check(edited(edit, rank=rank))


def test_the_unedited_schedule_passes() -> None:
    check(edited(lambda steps: None))


def test_dropped_wait() -> None:
    def edit(steps: list[Step]) -> None:
        del steps[find(steps, Wait, tensor="k", chunk=1)]

    assert_rejected(edit, r"rank 0, step \d+ \(pull_q\[0\]: attend .*\): reads k\[chunk 1.* wait")


def test_wait_after_the_read() -> None:
    def edit(steps: list[Step]) -> None:
        wait = steps.pop(find(steps, Wait, tensor="v", chunk=1))
        steps.insert(find(steps, Attend, nth=1) + 1, wait)

    assert_rejected(edit, r"reads v\[chunk 1, heads 0\] without a wait")


def test_dropped_put() -> None:
    def edit(steps: list[Step]) -> None:
        del steps[find(steps, Put, tensor="q")]

    assert_rejected(edit, r"rank 2, step \d+ .*waits for rank 0, but nobody puts this slot")


def test_swapped_slot() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Put, tensor="k", chunk=0, peer=2)
        steps[index] = replace(steps[index], block=Block("v", 0, 1))

    assert_rejected(edit, r"slot already put by rank 0")


def test_put_to_the_wrong_rank() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Put, tensor="q", peer=2)
        steps[index] = replace(steps[index], peer=3)

    assert_rejected(edit, r"waits for rank 0, but nobody puts this slot")


def test_wait_for_the_wrong_rank() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Wait, tensor="q", peer=2)
        steps[index] = replace(steps[index], peer=3)

    assert_rejected(edit, r"waits for rank 3, but rank 2 puts this slot")


def test_second_wait() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Wait, tensor="k", chunk=1)
        steps.insert(index, steps[index])

    assert_rejected(edit, "waits twice for one put")


def test_put_that_nobody_waits_for() -> None:
    def edit(steps: list[Step]) -> None:
        steps.append(Put("extra", "torus", Block("q", 0, 0), 3))

    assert_rejected(edit, r"rank 3: never waits for q\[chunk 0, heads 0\] from rank 0")


def test_put_to_itself() -> None:
    def edit(steps: list[Step]) -> None:
        steps.append(Put("extra", "torus", Block("q", 0, 0), 0))

    assert_rejected(edit, "puts to itself")


def test_duplicated_pair() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Attend)
        steps.insert(index, steps[index])

    assert_rejected(edit, "pair attended twice for query chunk 0")


def test_missing_pair() -> None:
    def edit(steps: list[Step]) -> None:
        del steps[find(steps, Attend)]

    assert_rejected(edit, r"query chunk 0, heads 0: key chunks \[0\] never attended")


def test_heads_of_another_rank() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Attend)
        steps[index] = replace(steps[index], heads=1)

    assert_rejected(edit, r"attends heads of another rank, own are range\(0, 1\)")


def test_early_overwrite() -> None:
    """A slot released before its last reader may be overwritten by the next layer's put."""

    def edit(steps: list[Step]) -> None:
        release = steps.pop(find(steps, Release, tensor="k", chunk=2))
        steps.insert(find(steps, Attend, keys=(2, 3)), release)

    assert_rejected(edit, r"attend q\[2\] with kv\[2,3\].*reads k\[chunk 2.*after its release")


def test_missing_release() -> None:
    def edit(steps: list[Step]) -> None:
        del steps[find(steps, Release)]

    assert_rejected(edit, r"rank 0: slot of .* never released")


def test_second_release() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Release)
        steps.insert(index, steps[index])

    assert_rejected(edit, "releases a slot that it does not hold")


def test_release_to_the_wrong_rank() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Release, tensor="o")
        steps[index] = replace(steps[index], peer=1)

    assert_rejected(edit, "releases the slot to a rank that does not write it")


def test_cyclic_wait() -> None:
    """Two ranks that wait for each other's keys before they put their own."""
    schedule = build("torus", Mesh(1, 1, 2))
    programs = []
    for program in schedule.programs:
        waits = [step for step in program.steps if isinstance(step, Wait)]
        rest = [step for step in program.steps if not isinstance(step, Wait)]
        programs.append(replace(program, steps=(*waits, *rest)))
    with pytest.raises(
        ScheduleError, match=r"cyclic wait: rank 0, layer 0, step 0 .*; rank 1, layer 0, step 0"
    ):
        check(replace(schedule, programs=tuple(programs)))


def test_copy_of_what_is_not_own() -> None:
    def edit(steps: list[Step]) -> None:
        steps.insert(0, Copy("extra", "compute", Block("q", 1, 0)))

    assert_rejected(edit, "copies what is not this rank's input")


def test_missing_copy() -> None:
    def edit(steps: list[Step]) -> None:
        del steps[find(steps, Copy, tensor="k")]

    assert_rejected(edit, r"reads k\[chunk 0, heads 0\] without a wait")


def test_output_sent_before_it_is_merged() -> None:
    def edit(steps: list[Step]) -> None:
        put = steps.pop(find(steps, Put, tensor="o"))
        steps.insert(find(steps, Merge), put)

    assert_rejected(edit, "sends output that is not merged")


def test_merge_that_misses_a_partial() -> None:
    def edit(steps: list[Step]) -> None:
        merge = steps.pop(find(steps, Merge))
        steps.insert(find(steps, Attend, queries=(2,), nth=1), merge)

    assert_rejected(edit, "attends chunk 2 after its merge")


def test_merge_of_nothing() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Merge)
        steps.insert(index, steps[index])

    assert_rejected(edit, "merges chunk 2, which has no partial")


def test_output_to_the_wrong_rank() -> None:
    def edit(steps: list[Step]) -> None:
        index = find(steps, Put, tensor="o")
        steps[index] = replace(steps[index], peer=3)

    assert_rejected(edit, "sends output of rank 2 to rank 3|nobody puts this slot")


def test_output_never_sent_home() -> None:
    def edit(steps: list[Step]) -> None:
        del steps[find(steps, Put, tensor="o")]

    assert_rejected(edit, r"never sent home|nobody puts this slot")


def test_result_with_missing_heads() -> None:
    def edit(steps: list[Step]) -> None:
        del steps[find(steps, Release, tensor="o")]
        index = find(steps, Collect)
        del steps[index - 1 : index + 1]  # its wait, and the collect

    assert_rejected(edit, r"rank 0: (output heads \[1\] missing|never waits for o)")


def test_operand_not_contiguous_in_memory() -> None:
    schedule = build("usp", Mesh(1, 1, 3))
    program = schedule.programs[0]
    attends = [step for step in program.steps if isinstance(step, Attend)]
    joined = replace(attends[1], keys=(attends[0].keys[0], attends[2].keys[0]))
    steps = [step for step in program.steps if step not in (attends[0], attends[2])]
    steps[steps.index(attends[1])] = joined
    copies = [Copy("ring[0]", "compute", Block(name, 0, 0)) for name in ("k", "v")]
    waits = [step for step in steps if isinstance(step, Wait)]
    rest = [step for step in steps if not isinstance(step, Wait | Release)]
    broken = replace(program, steps=(*copies, *waits, *rest))
    with pytest.raises(ScheduleError, match=r"operand \(0, 1\) is not contiguous"):
        check(replace(schedule, programs=(broken, *schedule.programs[1:])))
