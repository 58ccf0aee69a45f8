"""The simulator moves the bytes and batches that the runtime moves."""

from __future__ import annotations

import pytest
import torch

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import AttentionShape, Plan
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.schedule.rounds import batches
from swiftfusion_xdit.schedule.steps import Put
from swiftfusion_xdit.simulate.batches import batch_order
from swiftfusion_xdit.simulate.sizes import BlockSizes, LayerShape
from swiftfusion_xdit.simulate.wiring import wire
from swiftfusion_xdit.topology import Topology
from tests.simulate_cases import MESHES


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("heads", [(12, 12), (13, 13), (24, 12)])
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_have_the_bytes_of_the_plans_slots(
    mesh: Mesh, heads: tuple[int, int], groups: int
) -> None:
    lengths = tuple(3 + rank for rank in range(mesh.size))
    shape = AttentionShape(2, lengths, lengths, *heads, 8, torch.bfloat16)
    plan = Plan(shape, build("pipelined", mesh, groups_per_rank=groups))
    sizes = BlockSizes(LayerShape(2, lengths, lengths, *heads, 8), mesh, groups)
    for program in plan.schedule.programs:
        for step in program.steps:
            if isinstance(step, Put):
                slot = plan.layouts[step.peer].slot(step.block, 0)
                assert sizes.block_bytes(step.block) == slot.num_bytes, (mesh, heads, step)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["usp", "torus", "folded", "pipelined"])
@pytest.mark.parametrize("whole_rounds", [False, True])
def test_batches_are_those_of_the_runtime(mesh: Mesh, name: str, whole_rounds: bool) -> None:
    shape = LayerShape.even(mesh.size, sequence=64 * mesh.size, num_heads=48, head_dim=8)
    groups = 2 if name == "pipelined" else 1
    sizes = BlockSizes(shape, mesh, groups)
    topology = Topology.split(mesh.size, mesh.torus)
    everyone = batch_order(wire(name, sizes, topology, symmetric=False), whole_rounds=whole_rounds)
    assert [tuple(batch) for batch in everyone] == list(
        batches(build(name, mesh, groups_per_rank=groups), whole_rounds=whole_rounds)
    )
    # One rank that stands for all finds its own part of them.
    alone = batch_order(wire(name, sizes, topology, symmetric=True), whole_rounds=whole_rounds)
    mine = [[message for message in batch if message[0] == 0] for batch in everyone]
    assert [sorted(batch) for batch in alone] == [sorted(batch) for batch in mine if batch]
