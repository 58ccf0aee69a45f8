"""What was measured on two H200, beside what the simulator says of the same layers.

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
from swiftfusion_xdit.simulate.search import MOST_GROUPS
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import one_sided, stock

# TFLOP/s of cuDNN's kernel with full waves, by head dim, where FlashAttention-4 is the GPU's own.
CUDNN_TFLOPS = ((64, 410.0), (128, 600.0))


@dataclass(frozen=True)
class MeasuredLayer:
    """One shape. Milliseconds of the floors and of xDiT's Ulysses over both GPUs, with
    FlashAttention-4 and with cuDNN; ``copy_engine`` is the pipelined prototype at its best split,
    as a replayed graph, over the FlashAttention-4 floor. ``host_bound``: xDiT's layer is.
    """

    name: str
    num_heads: int
    sequence: int
    head_dim: int
    floor_fa4: float
    floor_cudnn: float
    ulysses_fa4: float
    ulysses_cudnn: float
    copy_engine: float
    host_bound: bool = False


MEASURED = (
    MeasuredLayer("flux 1024", 24, 4608, 128, 0.219, 0.235, 0.704, 0.611, 1.49, host_bound=True),
    MeasuredLayer("flux 2048", 24, 16896, 128, 2.57, 2.86, 3.52, 3.71, 1.08),
    MeasuredLayer("flux 3072", 24, 37376, 128, 12.7, 14.0, 14.8, 15.9, 1.01),
    MeasuredLayer("cogvideox-5b 49 f", 48, 17776, 64, 3.58, 4.75, 4.63, 5.64, 1.10),
    MeasuredLayer("wan2.1-14b 480p", 40, 32760, 128, 16.2, 19.4, 19.6, 21.5, 1.04),
    MeasuredLayer("wan2.1-14b 720p", 40, 75600, 128, 87.7, 104.0, 95.0, 110.0, 1.02),
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
            simulated = _ratio(ulysses(shape, on))
            yield Comparison(row.name, what, ratio, simulated, row.host_bound)
        simulated = min(
            _ratio(pipelined(shape, cluster, groups)) for groups in range(1, MOST_GROUPS + 1)
        )
        yield Comparison(row.name, "copy engines, graph", row.copy_engine, simulated, False)


def ulysses(shape: LayerShape, cluster: Cluster) -> LayerTime:
    """xDiT's Ulysses over two GPUs."""
    old = stock()
    return simulate_layer(
        "usp", Mesh(ulysses=2), shape, cluster, inside=old, across=old, costs=Costs(cluster.gpu)
    )


def pipelined(shape: LayerShape, cluster: Cluster, groups: int) -> LayerTime:
    """Head groups over copy engines on two GPUs."""
    puts = one_sided()
    return simulate_layer(
        "pipelined",
        Mesh(ulysses=2),
        shape,
        cluster,
        inside=puts,
        across=puts,
        groups_per_rank=groups,
    )


def _ratio(layer: LayerTime) -> float:
    return layer.total_us / layer.floor_us
