"""Symmetric memory of a candidate, from the layout that the runtime uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swiftfusion_xdit.planner.candidates import Candidate
from swiftfusion_xdit.schedule import build_program
from swiftfusion_xdit.schedule.steps import Schedule
from swiftfusion_xdit.simulate.sizes import LayerShape

if TYPE_CHECKING:
    from swiftfusion_xdit.plan import AttentionShape

# Plans need torch for their dtypes; the commands that plan must start, and speak, without it.


def attention_shape(shape: LayerShape) -> AttentionShape:
    """The same sizes as a plan takes them."""
    import torch

    from swiftfusion_xdit.plan import AttentionShape

    dtypes = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    return AttentionShape(
        batch=shape.batch,
        query_lengths=shape.query_lengths,
        key_lengths=shape.key_lengths,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtypes[shape.itemsize],
    )


def layer_shape(shape: AttentionShape) -> LayerShape:
    """A plan's sizes as the planner and the simulator take them."""
    return LayerShape(
        batch=shape.batch,
        query_lengths=shape.query_lengths,
        key_lengths=shape.key_lengths,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        itemsize=shape.dtype.itemsize,
    )


def symmetric_bytes(candidate: Candidate, shape: LayerShape) -> int:
    """Bytes of slots on each rank.

    Args:
        shape: with the same rows and heads on every rank, so that rank 0 stands for all.
    """
    if candidate.strategy != "torus":
        return 0
    from swiftfusion_xdit.plan import NUM_PARITIES, Layout, Plan

    name, mesh, groups = candidate.schedule, candidate.mesh, candidate.groups_per_rank
    program = build_program(name, mesh, 0, groups_per_rank=groups)
    schedule = Schedule(name, mesh, groups, (program,))
    plan = Plan(attention_shape(shape), schedule, candidate.edge_heads)
    return NUM_PARITIES * Layout(plan, 0).layer_bytes
