"""Small clusters and every kind of layer, for the simulator's tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.simulate.hardware import Cluster, Gpu, Link
from swiftfusion_xdit.simulate.layer import LayerTime, simulate_layer
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import PathUse, Transport, nccl, one_sided, stock

# Four units, so that few tiles are whole waves, and memory that costs nothing.
IDEAL_GPU = Gpu("ideal", 4, ((64, 100.0),), 100.0, 1e12, 80.0, kernel_us=0.0)
REAL_GPU = Gpu("real", 108, ((64, 190.0), (128, 220.0)), 230.0, 1800.0, 80.0)
PLAIN = Transport("plain")
TRANSPORTS = (one_sided(), nccl(), stock(), Transport("two-sided", two_sided=True))


def make_cluster(
    mesh: Mesh, *, gpu: Gpu = REAL_GPU, latency_us: float = 5.0, per_gpu: float | None = 12.5
) -> Cluster:
    """As many machines as the torus axis is long."""
    return Cluster(
        "test",
        gpu,
        num_machines=mesh.torus,
        gpus_per_machine=mesh.size // mesh.torus,
        inside=Link(250.0, latency_us),
        across=Link(50.0, 4 * latency_us),
        across_gb_per_s_per_gpu=per_gpu,
    )


@dataclass(frozen=True)
class Case:
    """One layer; printed whole when a test fails."""

    schedule: str
    mesh: Mesh
    shape: LayerShape
    transport: Transport
    groups_per_rank: int = 1
    symmetric: bool | None = None

    def simulate(self, cluster: Cluster | None = None, **options: Any) -> LayerTime:
        return simulate_layer(
            self.schedule,
            self.mesh,
            self.shape,
            cluster or make_cluster(self.mesh),
            inside=self.transport,
            across=self.transport,
            groups_per_rank=self.groups_per_rank,
            symmetric=self.symmetric,
            **options,
        )


MESHES = tuple(
    Mesh(*degrees)
    for degrees in (
        (1, 1, 1), (1, 2, 1), (1, 1, 3), (1, 2, 2), (2, 1, 1), (3, 1, 1), (2, 2, 1), (2, 1, 2),
        (2, 2, 2), (3, 2, 1), (4, 1, 2),
    )
)  # fmt: skip


def random_case(seed: int) -> Case:
    """Any schedule, mesh, transport and lengths, even or not, empty chunks among them."""
    rng = random.Random(seed)
    mesh = rng.choice(MESHES)
    schedule = rng.choice(("usp", "torus", "folded", "pipelined"))
    groups = rng.randint(1, 3) if schedule == "pipelined" else 1
    lengths = tuple(rng.choice((0, 1, 100, 500, 2000)) for _ in range(mesh.size))
    if rng.random() < 0.5:
        lengths = (rng.choice((128, 1000)),) * mesh.size
    kv_heads = mesh.num_head_groups * groups * rng.randint(1, 2) + rng.randint(0, 1)
    shape = LayerShape(
        batch=rng.randint(1, 2),
        query_lengths=lengths,
        key_lengths=lengths,
        num_heads=kv_heads * rng.randint(1, 2),
        num_kv_heads=kv_heads,
        head_dim=64,
    )
    slow = Transport("slow", inside=PathUse(0.5, 3.0), across=PathUse(0.3, 9.0), barriers=True)
    transport = rng.choice((*TRANSPORTS, slow))
    return Case(schedule, mesh, shape, transport, groups, rng.choice((None, False)))
