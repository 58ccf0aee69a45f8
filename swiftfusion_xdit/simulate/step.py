"""From one attention layer to one step of a model."""

from __future__ import annotations

from dataclasses import dataclass

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.simulate.cost import FLOPS_PER_US, Costs
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.layer import LayerTime, simulate_layer
from swiftfusion_xdit.simulate.models import Model
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import Transport


@dataclass(frozen=True)
class Strategy:
    """A schedule on a mesh over transports: everything that may be chosen."""

    schedule: str
    mesh: Mesh
    inside: Transport
    across: Transport
    groups_per_rank: int = 1
    merge_passes: float = 1.0

    def __str__(self) -> str:
        groups = f" x {self.groups_per_rank}" if self.groups_per_rank > 1 else ""
        return f"{self.schedule}{groups} {self.mesh}"


@dataclass(frozen=True)
class StepTime:
    """One model step; every layer's attention is simulated alike."""

    total_us: float
    rest_us: float
    layer: LayerTime


def simulate_step(
    model: Model,
    cluster: Cluster,
    strategy: Strategy,
    *,
    sequence: int,
    batch: int = 1,
    symmetric: bool | None = None,
) -> StepTime:
    """One step of ``model`` over ``sequence`` rows of self-attention, text included.

    Rows are padded to the same number on each rank where that lets one rank stand for all: less
    than one row in a thousand of the workloads that need several machines.

    Raises:
        ValueError: mesh, heads and cluster do not fit.
    """
    num_ranks = cluster.num_ranks
    padded = -(-sequence // num_ranks) * num_ranks
    shape = LayerShape.even(
        num_ranks,
        sequence=sequence if symmetric is False else padded,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        batch=batch,
    )
    layer = simulate_layer(
        strategy.schedule,
        strategy.mesh,
        shape,
        cluster,
        inside=strategy.inside,
        across=strategy.across,
        groups_per_rank=strategy.groups_per_rank,
        symmetric=symmetric,
        costs=Costs(cluster.gpu, merge_passes=strategy.merge_passes),
    )
    rest = model.num_layers * rest_us(model, cluster, batch * max(shape.query_lengths))
    return StepTime(model.num_layers * layer.total_us + rest, rest, layer)


def rest_us(model: Model, cluster: Cluster, rows: float) -> float:
    """One block without its self-attention, on a rank that holds ``rows`` rows."""
    products = model.product_flops(rows) / (cluster.gpu.gemm_tflops * FLOPS_PER_US)
    return products + Costs(cluster.gpu).stream_us(model.memory_bytes(rows))
