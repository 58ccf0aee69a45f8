"""The links of a cluster as the engine shares them.

Each GPU has a way out to its machine and a way in; each machine has a way out to the others and a
way in, shared by its GPUs, of which one GPU alone may get a part only. Where one rank stands for
all, it has its equal share of its machine's ways, and what comes in mirrors what goes out.
"""

from __future__ import annotations

from swiftfusion_xdit.simulate.engine import Resource
from swiftfusion_xdit.simulate.hardware import BYTES_PER_US, Cluster
from swiftfusion_xdit.simulate.transport import Transport
from swiftfusion_xdit.topology import Link as LinkClass


class Fabric:
    """Capacities and paths for one simulation."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        inside: Transport,
        across: Transport,
        symmetric: bool,
        several_peers: bool = False,
        free_links: bool = False,
    ) -> None:
        """``several_peers``: whether ranks put to more than one other of their machine."""
        self.topology = cluster.topology
        self.symmetric = symmetric
        self.engines: dict[Resource, int] = {}
        self.capacity: dict[Resource, float] = {}
        self._cluster = cluster
        self._ranks = range(1) if symmetric else range(cluster.num_ranks)
        for rank in self._ranks:
            self.engines["copy engine", rank] = cluster.gpu.num_copy_engines
        if free_links:
            return
        reached = inside.inside.fraction * (inside.inside.several_peers if several_peers else 1)
        self._add_inside(reached * BYTES_PER_US * cluster.inside.gb_per_s)
        if cluster.across is not None:
            self._add_across(across.across.fraction * BYTES_PER_US)

    def _add_inside(self, rate: float) -> None:
        for rank in self._ranks:
            for way in ("out", "in"):
                self.capacity["gpu", way, rank] = rate

    def _add_across(self, scale: float) -> None:
        cluster = self._cluster
        assert cluster.across is not None
        machine, per_gpu = cluster.across.gb_per_s, cluster.across_gb_per_s_per_gpu
        if self.symmetric:
            machine /= cluster.gpus_per_machine
        for way in ("out", "in"):
            for number in range(1 if self.symmetric else cluster.num_machines):
                self.capacity["machine", way, number] = scale * machine
            for rank in self._ranks if per_gpu is not None else ():
                self.capacity["nic", way, rank] = scale * (per_gpu or machine)

    def links(self, src: int, dst: int, link: LinkClass) -> tuple[Resource, ...]:
        """The ways that a transfer takes."""
        if self.symmetric:
            src = dst = 0
        if link is LinkClass.SAME_MACHINE:
            return (("gpu", "out", src), ("gpu", "in", dst))
        here, there = self.topology.machine_of[src], self.topology.machine_of[dst]
        return (
            ("nic", "out", src),
            ("machine", "out", here),
            ("machine", "in", there),
            ("nic", "in", dst),
        )
