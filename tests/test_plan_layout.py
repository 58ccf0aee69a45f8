"""Slots of one rank never overlap and operands of several chunks are one window."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from swiftfusion_xdit.plan import NUM_PARITIES, AttentionShape, Plan
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.schedule.steps import Attend, Block, Copy, Put
from tests.meshes import meshes_up_to


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    mesh = draw(st.sampled_from(meshes_up_to(12)))
    name, most_groups = draw(
        st.sampled_from([("torus", 1), ("folded", 1), ("usp", 1), ("pipelined", 3)])
    )
    kv_heads = draw(st.integers(1, 5))
    shared_by = draw(st.integers(1, 4))
    while kv_heads * shared_by < mesh.num_head_groups:
        shared_by += 1
    groups = min(draw(st.integers(1, most_groups)), kv_heads * shared_by // mesh.num_head_groups)
    lengths = st.lists(st.integers(0, 5), min_size=mesh.size, max_size=mesh.size)
    shape = AttentionShape(
        batch=draw(st.integers(1, 2)),
        query_lengths=tuple(draw(lengths)),
        key_lengths=tuple(draw(lengths)),
        num_heads=kv_heads * shared_by,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 8])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        wire=draw(st.sampled_from(["exact", "fp8"])),
    )
    return Plan(shape, build(name, mesh, groups_per_rank=groups))


def slots_of(plan: Plan, owner: int) -> list[Block]:
    """Everything that is written to one rank's memory."""
    received = [
        step.block
        for program in plan.schedule.programs
        for step in program.steps
        if isinstance(step, Put) and step.peer == owner
    ]
    copied = [s.block for s in plan.schedule.programs[owner].steps if isinstance(s, Copy)]
    return received + copied


@given(plan=plans(), data=st.data())
def test_every_element_belongs_to_one_slot(plan: Plan, data: st.DataObject) -> None:
    owner = data.draw(st.integers(0, plan.mesh.size - 1))
    memory = torch.zeros(plan.symmetric_bytes, dtype=torch.uint8)
    written = 0
    for parity in range(NUM_PARITIES):
        for block in slots_of(plan, owner):
            slot = plan.layouts[owner].slot(block, parity)
            slot.view(memory).view(torch.uint8).add_(1)
            written += slot.num_bytes
    assert int(memory.max() if memory.numel() else 0) <= 1
    assert int(memory.sum()) == written


@given(plan=plans(), data=st.data())
def test_operands_are_their_slots_in_order(plan: Plan, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.mesh.size - 1))
    layout, program = plan.layouts[rank], plan.schedule.programs[rank]
    memory = torch.randint(0, 256, (plan.symmetric_bytes,), dtype=torch.uint8)
    for step in program.steps:
        if not isinstance(step, Attend) or not program.from_slots(step.keys):
            continue
        operand = layout.operand("k", step.keys, step.heads, 1).view(memory)
        slots = [layout.slot(Block("k", key, step.heads), 1).view(memory) for key in step.keys]
        as_bytes = torch.cat(slots, dim=1).view(torch.uint8)
        assert torch.equal(operand.contiguous().view(torch.uint8), as_bytes)


@given(plan=plans())
def test_heads_are_split_evenly_and_flags_are_distinct(plan: Plan) -> None:
    heads = [head for group in plan.query_heads for head in group]
    assert heads == list(range(plan.shape.num_heads))
    sizes = [len(group) for group in plan.query_heads]
    assert min(sizes) >= 1
    for rank in range(plan.mesh.size):
        indices = [
            flag
            for parity in range(NUM_PARITIES)
            for flag in (
                *(plan.full_flag(rank, block, parity) for block in plan.full_flags[rank]),
                *(plan.free_flag(rank, *key, parity) for key in plan.free_flags[rank]),
            )
        ]
        assert len(set(indices)) == len(indices)
        assert all(0 <= index < plan.num_flags for index in indices)
