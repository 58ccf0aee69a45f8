"""What no execution of a candidate can beat: it spares the planner most simulations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from swiftfusion_xdit.mesh import Mesh, head_group_sizes
from swiftfusion_xdit.planner.candidates import Candidate
from swiftfusion_xdit.simulate.cost import FLOPS_PER_US, Costs
from swiftfusion_xdit.simulate.hardware import BYTES_PER_US, Cluster
from swiftfusion_xdit.simulate.sizes import BlockSizes, LayerShape
from swiftfusion_xdit.simulate.transport import Transport

# Transfers over attention from which on overlap is worth less than few batches.
DOMINANT = 3.0


def even_shape(shape: LayerShape, mesh: Mesh) -> LayerShape:
    """The shape with the largest head group and the mean rows on every rank.

    A layer takes as long as its busiest rank, so this is what to predict; and where all ranks do
    the same, one of them stands for all.
    """
    num_ranks, groups = mesh.size, mesh.num_head_groups
    sizes = BlockSizes(shape, mesh)
    heads = sizes.num_heads("q", 0)  # larger groups come first
    kv_heads = max(sizes.num_heads("k", group) for group in range(groups))
    while heads % kv_heads:
        kv_heads += 1
    queries = math.ceil(sum(shape.query_lengths) / num_ranks)
    keys = math.ceil(sum(shape.key_lengths) / num_ranks)
    return LayerShape(
        batch=shape.batch,
        query_lengths=(queries,) * num_ranks,
        key_lengths=(keys,) * num_ranks,
        num_heads=heads * groups,
        num_kv_heads=kv_heads * groups,
        head_dim=shape.head_dim,
        itemsize=shape.itemsize,
    )


def lower_bound_us(
    candidate: Candidate, shape: LayerShape, cluster: Cluster, transport: Transport
) -> float:
    """Microseconds that a layer takes at least.

    Args:
        shape: even, see ``even_shape``.
    """
    mesh = candidate.mesh
    attention_us = _attention_us(candidate, shape, cluster, overlap=not transport.two_sided)
    ways = _ways(mesh, cluster, transport)

    def exchange_us(tensors: str) -> float:
        return max((way.time_us(tensors, shape, mesh) for way in ways), default=0.0)

    received_us, sent_us = exchange_us("qkv"), exchange_us("o")
    everything_us = max(attention_us, exchange_us("qkvo"))
    rate = cluster.gpu.attention_rate(shape.head_dim) * FLOPS_PER_US
    ideal_us, remote = shape.flops / mesh.size / rate, 1 - 1 / mesh.torus
    if candidate.schedule == "torus":
        # The last machine's keys are attended for all remote rows before any of these goes home.
        last_us = ideal_us * remote / mesh.torus
        return max(everything_us, received_us + last_us + sent_us)
    if candidate.schedule == "folded":
        # Only the stationary rows are attended while the others arrive.
        return max(everything_us, received_us + ideal_us * remote + sent_us)
    if candidate.schedule == "usp":  # keys come in while others are attended
        return max(everything_us, exchange_us("q") + attention_us + sent_us)
    if candidate.schedule == "fused":  # keys come in while others are attended; no output moves
        return everything_us
    # Nothing hides the first group's way in; the own queries hide the last one's way home.
    heads = shape.num_heads // mesh.num_head_groups
    parts = _group_sizes(candidate, heads)
    first_us = received_us * parts[0] / heads + attention_us
    last_us = received_us + ideal_us * parts[-1] / heads
    return max(everything_us, first_us, last_us)


def transfers_over_attention(
    candidate: Candidate, shape: LayerShape, cluster: Cluster, transport: Transport
) -> float:
    """How many times the attention's time a layer's bytes take between machines.

    Of a transport whose puts are sends that their receivers join, which is what the answer is for;
    0 of any other, and on one machine. From rates that all ranks have agreed on.

    Args:
        shape: even, see ``even_shape``.
    """
    if not transport.two_sided or cluster.num_machines == 1:
        return 0.0
    ways = _ways(candidate.mesh, cluster, transport)
    transfers_us = max((way.time_us("qkvo", shape, candidate.mesh) for way in ways), default=0.0)
    return transfers_us / _attention_us(candidate, shape, cluster, overlap=False)


def transfers_dominate(
    candidate: Candidate, shape: LayerShape, cluster: Cluster, transport: Transport
) -> bool:
    """Whether attention can hide so little of a layer's bytes that they go in whole rounds.

    Such a layer is taken to be better off with few batches than with overlap: four hosts over TCP
    had attention for a tenth of the transfers' time. The two were not compared in one run.
    """
    return transfers_over_attention(candidate, shape, cluster, transport) >= DOMINANT


def num_messages(candidate: Candidate) -> int:
    """Puts of one rank, about: q, k and v to those that attend them, and o home."""
    mesh = candidate.mesh
    return candidate.groups_per_rank * 2 * (mesh.num_head_groups + mesh.size - 2)


@dataclass(frozen=True)
class Way:
    """How many chunks one rank receives on a class of path, and at which rate.

    ``queries`` also counts the chunks of output that come home.
    """

    queries: int
    keys: int
    bytes_per_us: float

    def time_us(self, tensors: str, shape: LayerShape, mesh: Mesh) -> float:
        num_elements = 0
        for tensor in tensors:
            is_key = tensor in "kv"
            heads = shape.num_kv_heads if is_key else shape.num_heads
            chunks = self.keys if is_key else self.queries
            rows = shape.key_lengths[0] if is_key else shape.query_lengths[0]
            num_elements += chunks * rows * (heads // mesh.num_head_groups)
        return num_elements * shape.batch * shape.head_dim * shape.itemsize / self.bytes_per_us


def _ways(mesh: Mesh, cluster: Cluster, transport: Transport) -> list[Way]:
    """Inside and across; none for a mesh of which it is not known what crosses."""
    inside = cluster.inside.gb_per_s * transport.inside.fraction * BYTES_PER_US
    groups = mesh.num_head_groups
    if cluster.num_machines == 1:
        return [Way(groups - 1, mesh.size - 1, inside)]
    alone = cluster.gpus_per_machine == 1  # with nobody to hand on what crosses, on any mesh
    if (mesh.torus != cluster.num_machines and not alone) or cluster.across is None:
        return []
    share = cluster.across.gb_per_s / cluster.gpus_per_machine
    if cluster.across_gb_per_s_per_gpu is not None:
        share = min(share, cluster.across_gb_per_s_per_gpu)
    across = share * transport.across.fraction * BYTES_PER_US
    if alone:
        return [Way(groups - 1, mesh.size - 1, across)]
    entering = groups - mesh.ulysses  # rows that cross, once each; the ring hands keys on
    return [
        Way(entering, entering, across),
        Way(mesh.ulysses - 1, mesh.size - 1 - entering, inside),
    ]


def _attention_us(
    candidate: Candidate, shape: LayerShape, cluster: Cluster, *, overlap: bool
) -> float:
    """The attention calls of one rank: one after another, or as full as they fill the GPU."""
    mesh, costs = candidate.mesh, Costs(cluster.gpu)
    heads = shape.num_heads // mesh.num_head_groups
    total_us = 0.0
    fused = candidate.schedule == "fused"
    for query_chunks, key_chunks, times in _calls(candidate.schedule, mesh):
        parts = [heads] if fused else _group_sizes(candidate, heads)
        for part in parts:
            tiles: dict[str, Any] = {
                "query_rows": query_chunks * shape.query_lengths[0],
                "num_heads": part,
                "head_dim": shape.head_dim,
                "batch": shape.batch,
                "fused": fused,
            }
            one_us = costs.attend_us(**tiles, key_rows=key_chunks * shape.key_lengths[0])
            share = costs.width(**tiles) if overlap else 1.0
            total_us += times * share * one_us
    return total_us


def _group_sizes(candidate: Candidate, heads: int) -> list[int]:
    return head_group_sizes(heads, candidate.groups_per_rank, edge_heads=candidate.edge_heads)


def _calls(schedule: str, mesh: Mesh) -> list[tuple[int, int, int]]:
    """(chunks of queries, chunks of keys, how often) of a rank's calls for one head group."""
    groups, entering, machine = mesh.num_head_groups, mesh.ulysses, mesh.ulysses * mesh.ring
    remote = mesh.torus - 1
    if schedule == "usp":
        return [(groups, groups, mesh.ring)]
    if schedule in ("pipelined", "fused"):
        return [(groups, mesh.size, 1)]
    stationary = [(entering, entering, mesh.ring), (entering, remote * machine, 1)]
    if schedule == "folded":
        return [*stationary, (remote * entering, mesh.size, 1)]
    return [*stationary, (entering, machine, remote), (remote * entering, machine, remote)]
