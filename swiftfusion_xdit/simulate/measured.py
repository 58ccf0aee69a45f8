"""What was measured on two GPUs, beside what the simulator says of the same layers.

xDiT's layers and the floors on two H200, ours on two H100: the same chip with other memory.

Ratios to the floor (the local attention kernel alone, on both GPUs at once), because absolute times
drift between runs. The simulator knows GPUs and links, not the host: layers that are bound by the
Python that enqueues them are outside of it, and are named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.simulate.cost import Costs
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.layer import LayerTime, simulate_layer
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import one_sided, stock

# TFLOP/s of cuDNN's kernel with full waves, by head dim, where FlashAttention-4 is the GPU's own.
CUDNN_TFLOPS = ((64, 410.0), (128, 600.0))


@dataclass(frozen=True)
class MeasuredLayer:
    """One shape. Milliseconds of the floors and of xDiT's Ulysses over both GPUs, with
    FlashAttention-4 and with cuDNN; ``ours`` is `torus` with its best schedule, as a replayed
    graph, over the FlashAttention-4 floor of that run. ``host_bound``: xDiT's layer is.
    """

    name: str
    num_heads: int
    sequence: int
    head_dim: int
    floor_fa4: float
    floor_cudnn: float
    ulysses_fa4: float
    ulysses_cudnn: float
    ours: float
    host_bound: bool = False


MEASURED = (
    MeasuredLayer("flux 1024", 24, 4608, 128, 0.219, 0.235, 0.704, 0.611, 1.07, host_bound=True),
    MeasuredLayer("flux 2048", 24, 16896, 128, 2.57, 2.86, 3.52, 3.71, 1.00),
    MeasuredLayer("flux 3072", 24, 37376, 128, 12.7, 14.0, 14.8, 15.9, 1.04),
    MeasuredLayer("cogvideox-5b 49 f", 48, 17776, 64, 3.58, 4.75, 4.63, 5.64, 1.09),
    MeasuredLayer("wan2.1-14b 480p", 40, 32760, 128, 16.2, 19.4, 19.6, 21.5, 1.04),
    MeasuredLayer("wan2.1-14b 720p", 40, 75600, 128, 87.7, 104.0, 95.0, 110.0, 1.01),
)


# Schedule, mesh, head groups and heads of the first and last of them.
OURS = (
    ("torus", Mesh(ring=2), 1, 0),
    ("torus", Mesh(torus=2), 1, 0),
    ("folded", Mesh(torus=2), 1, 0),
    ("fused", Mesh(ring=2), 4, 0),
    *(("pipelined", Mesh(ulysses=2), 3, edge_heads) for edge_heads in (1, 2)),
)


@dataclass(frozen=True)
class Comparison:
    """A ratio to the floor, measured and simulated."""

    shape: str
    what: str
    measured: float
    simulated: float
    host_bound: bool

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


def compare(cluster: Cluster) -> Iterator[Comparison]:
    """Every measured layer on ``cluster``, two H200 of one machine."""
    gpu = dataclasses.replace(cluster.gpu, attention_tflops=CUDNN_TFLOPS)
    cudnn = dataclasses.replace(cluster, gpu=gpu)
    for row in MEASURED:
        shape = LayerShape.even(
            2, sequence=row.sequence, num_heads=row.num_heads, head_dim=row.head_dim
        )
        for what, on, ratio in (
            ("xDiT u2, FA4", cluster, row.ulysses_fa4 / row.floor_fa4),
            ("xDiT u2, cuDNN", cudnn, row.ulysses_cudnn / row.floor_cudnn),
        ):
            layer = ulysses(shape, on)
            simulated = layer.total_us / layer.floor_us
            yield Comparison(row.name, what, ratio, simulated, row.host_bound)
        # The floor is half of the heads with all rows, whatever our mesh is.
        simulated = ours(shape, cluster).total_us / ulysses(shape, cluster).floor_us
        yield Comparison(row.name, "ours, FA4, graph", row.ours, simulated, False)


def ulysses(shape: LayerShape, cluster: Cluster) -> LayerTime:
    """xDiT's Ulysses over two GPUs."""
    old = stock()
    return simulate_layer(
        "usp", Mesh(ulysses=2), shape, cluster, inside=old, across=old, costs=Costs(cluster.gpu)
    )


def ours(shape: LayerShape, cluster: Cluster) -> LayerTime:
    """The best of the schedules that two GPUs of one machine can take."""
    puts = one_sided()
    return min(
        (
            simulate_layer(
                name,
                mesh,
                shape,
                cluster,
                inside=puts,
                across=puts,
                groups_per_rank=groups,
                edge_heads=edge_heads,
            )
            for name, mesh, groups, edge_heads in OURS
        ),
        key=lambda layer: layer.total_us,
    )
