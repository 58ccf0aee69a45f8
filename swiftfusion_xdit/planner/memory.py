"""Symmetric memory of a candidate, from the layout that the runtime uses."""

from __future__ import annotations

import torch

from swiftfusion_xdit.plan import NUM_PARITIES, AttentionShape, Layout, Plan
from swiftfusion_xdit.planner.candidates import Candidate
from swiftfusion_xdit.schedule import BUILDERS
from swiftfusion_xdit.schedule.steps import Schedule
from swiftfusion_xdit.simulate.sizes import LayerShape

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def attention_shape(shape: LayerShape) -> AttentionShape:
    """The same sizes as a plan takes them."""
    return AttentionShape(
        batch=shape.batch,
        query_lengths=shape.query_lengths,
        key_lengths=shape.key_lengths,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=DTYPES[shape.itemsize],
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
    name, mesh, groups = candidate.schedule, candidate.mesh, candidate.groups_per_rank
    options = {"groups_per_rank": groups} if name == "pipelined" else {}
    program = BUILDERS[name](mesh, 0, **options)
    plan = Plan(attention_shape(shape), Schedule(name, mesh, groups, (program,)))
    return NUM_PARITIES * Layout(plan, 0).layer_bytes
