"""Simulates attention layers: a schedule, a shape and a cluster give times."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.schedule.fused import suits_kernel_puts
from swiftfusion_xdit.schedule.steps import Put
from swiftfusion_xdit.simulate.cost import Costs
from swiftfusion_xdit.simulate.engine import Engine, Op, OpGraph
from swiftfusion_xdit.simulate.fabric import Fabric
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.program_ops import GraphBuilder
from swiftfusion_xdit.simulate.setting import Setting
from swiftfusion_xdit.simulate.sizes import BlockSizes, LayerShape
from swiftfusion_xdit.simulate.timeline import Event
from swiftfusion_xdit.simulate.transport import Transport, with_kernel_puts
from swiftfusion_xdit.simulate.wiring import wire
from swiftfusion_xdit.topology import Link as LinkClass


@dataclass(frozen=True)
class LayerTime:
    """What one layer took.

    ``total_us`` is the time from one layer's end to the next one's, on the slowest rank;
    ``floor_us`` what its local attention takes in one call; ``symmetric`` whether one rank stood
    for all. ``bytes_across`` is what one GPU sends to other machines.
    """

    total_us: float
    floor_us: float
    attention_us: float
    bytes_across: float
    symmetric: bool
    num_ranks: int
    graph: OpGraph = field(repr=False)
    layer_start_us: float = 0.0

    @property
    def exposed_us(self) -> float:
        """What the layer takes beyond its attention calls: communication, merges, copies."""
        return self.total_us - self.attention_us

    def events(self) -> list[Event]:
        """What every simulated rank did: a lane per stream, and one per class of link."""
        ops = [op for op in self.graph.ops if op.start_us >= self.layer_start_us]
        events = []
        for op in ops:
            start_us = op.start_us if op.since is None else op.since.start_us
            if op.drawn and op.end_us > start_us:
                events.append(Event(op.rank, op.stream, op.name, start_us, op.end_us))
        return events + _link_events(ops)


def _link_events(ops: list[Op]) -> list[Event]:
    """When each rank's ways out were in use; transfers that overlap are one event."""
    lanes: dict[tuple[int, str], list[Op]] = defaultdict(list)
    for op in ops:
        if op.moved:
            link = "nvlink" if op.links[0][0] == "gpu" else "nic"  # type: ignore[index]
            lanes[op.rank, f"link {link}"].append(op)
    events = []
    for (rank, lane), flows in lanes.items():
        groups: list[list[Op]] = []
        for op in sorted(flows, key=lambda op: (op.moved[0][0], op.index)):
            if groups and op.moved[0][0] < max(other.moved[-1][1] for other in groups[-1]):
                groups[-1].append(op)
            else:
                groups.append([op])
        for group in groups:
            name = group[0].name if len(group) == 1 else f"put {len(group)} blocks"
            end_us = max(op.moved[-1][1] for op in group)
            events.append(Event(rank, lane, name, group[0].moved[0][0], end_us))
    return events


def simulate_layer(
    schedule: str,
    mesh: Mesh,
    shape: LayerShape,
    cluster: Cluster,
    *,
    inside: Transport,
    across: Transport,
    groups_per_rank: int = 1,
    edge_heads: int = 0,
    num_layers: int = 1,
    symmetric: bool | None = None,
    costs: Costs | None = None,
    free_links: bool = False,
    whole_rounds: bool = False,
) -> LayerTime:
    """Simulate consecutive layers and time the last one.

    Args:
        schedule: a key of ``schedule.BUILDERS``.
        inside, across: transports inside a machine and across.
        groups_per_rank, edge_heads: head groups, see ``mesh.head_group_sizes``.
        symmetric: let one rank stand for all; None: where that is possible.
        costs: of local work; by default those of the cluster's GPU with fused merges.
        free_links: communication takes no time.
        whole_rounds: two-sided transfers go in whole rounds, see ``schedule/rounds.py``.

    Raises:
        ValueError: mesh, shape and cluster do not fit, the schedule does not exist, or there is
            no layer to simulate.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    sizes = BlockSizes(shape, mesh, groups_per_rank, edge_heads)
    mesh.require(num_ranks=cluster.num_ranks, num_heads=shape.num_heads)
    if schedule == "fused" and suits_kernel_puts(shape):
        inside = with_kernel_puts(inside)
    wiring = wire(schedule, sizes, cluster.topology, symmetric=symmetric)
    fabric = Fabric(
        cluster,
        inside=inside,
        across=across,
        symmetric=wiring.symmetric,
        several_peers=wiring.most_peers_inside(cluster.topology) > 1,
        free_links=free_links,
    )
    costs = costs or Costs(cluster.gpu)
    setting = Setting(
        cluster, sizes, wiring, fabric, costs, inside, across, free_links, whole_rounds
    )
    return _time_last_layer(setting, num_layers)


def _time_last_layer(setting: Setting, num_layers: int) -> LayerTime:
    builder, wiring = GraphBuilder(setting), setting.wiring
    for _ in range(num_layers):
        builder.add_layer()
    Engine(
        builder.graph,
        capacity=setting.fabric.capacity,
        engines=setting.fabric.engines,
        num_units=setting.cluster.gpu.num_units,
    ).run()
    ends = [max(op.end_us for op in layer.ends.values()) for layer in builder.layers]
    start = ends[-2] if num_layers > 1 else 0.0
    ranks = [program.rank for program in wiring.programs]
    return LayerTime(
        total_us=ends[-1] - start,
        floor_us=max(floor_us(setting.sizes, setting.costs, rank) for rank in ranks),
        attention_us=max(_attention_us(builder.graph, rank) / num_layers for rank in ranks),
        bytes_across=max(_bytes_across(setting, rank) for rank in ranks),
        symmetric=wiring.symmetric,
        num_ranks=wiring.mesh.size,
        graph=builder.graph,
        layer_start_us=start,
    )


def floor_us(sizes: BlockSizes, costs: Costs, rank: int) -> float:
    """One attention call over all that ``rank`` attends: a layer without communication."""
    mesh, groups = sizes.mesh, sizes.groups_per_rank
    first = mesh.head_group(rank) * groups
    return costs.attend_us(
        query_rows=sizes.rows("q", mesh.query_ranks(rank)),
        key_rows=sum(sizes.shape.key_lengths),
        num_heads=sum(sizes.num_heads("q", heads) for heads in range(first, first + groups)),
        head_dim=sizes.shape.head_dim,
        batch=sizes.shape.batch,
    )


def _attention_us(graph: OpGraph, rank: int) -> float:
    """The attention calls of a rank at full rate; calls that may overlap as full as they are."""
    calls = [op for op in graph.ops if op.rank == rank and op.attend_us and op.attends]
    overlap = len({op.stream for op in calls}) > 1
    return sum(op.attend_us * (op.width if overlap else 1.0) for op in calls)


def _bytes_across(setting: Setting, rank: int) -> float:
    program = next(p for p in setting.wiring.programs if p.rank == rank)
    return sum(
        setting.sizes.block_bytes(step.block)
        for step in program.steps
        if isinstance(step, Put) and setting.link(rank, step.peer) is LinkClass.ACROSS_MACHINES
    )
