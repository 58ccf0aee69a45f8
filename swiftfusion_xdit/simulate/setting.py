"""What a layer is simulated on and with, and what it has added to the graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from swiftfusion_xdit.schedule.steps import Block
from swiftfusion_xdit.simulate.cost import Costs
from swiftfusion_xdit.simulate.engine import Op
from swiftfusion_xdit.simulate.fabric import Fabric
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.sizes import BlockSizes
from swiftfusion_xdit.simulate.transport import PathUse, Transport
from swiftfusion_xdit.simulate.wiring import Message, Wiring
from swiftfusion_xdit.topology import Link as LinkClass


@dataclass(frozen=True)
class Setting:
    """What a layer is simulated on and with."""

    cluster: Cluster
    sizes: BlockSizes
    wiring: Wiring
    fabric: Fabric
    costs: Costs
    inside: Transport
    across: Transport
    free_links: bool = False
    whole_rounds: bool = False

    def link(self, src: int, dst: int) -> LinkClass:
        return self.fabric.topology.link(src, dst)

    def transport(self, link: LinkClass) -> Transport:
        return self.inside if link is LinkClass.SAME_MACHINE else self.across

    @property
    def own_passes(self) -> int:
        """Copies of a rank's own share: it is packed and unpacked with what is sent."""
        return max(1, self.inside.pack_passes, self.across.pack_passes)

    def use(self, link: LinkClass) -> PathUse:
        """How the transport of this class of path uses it."""
        transport = self.transport(link)
        return transport.inside if link is LinkClass.SAME_MACHINE else transport.across

    def message_us(self, link: LinkClass) -> float:
        return 0.0 if self.free_links else self.use(link).message_us

    @property
    def held_units(self) -> int:
        """What a batch takes from attention."""
        return max(self.inside.held_units, self.across.held_units)

    def pack_us(self, num_bytes: float) -> float:
        """Copies of what a batch sends, to and from contiguous buffers."""
        passes = max(self.inside.pack_passes, self.across.pack_passes)
        return passes * self.costs.copy_us(num_bytes)

    def start_us(self, link: LinkClass) -> float:
        """What passes before the first byte of an operation on this class of path."""
        if self.free_links:
            return 0.0
        path = self.cluster.inside if link is LinkClass.SAME_MACHINE else self.cluster.across
        assert path is not None, "a cluster of several machines has a path across"
        use = self.use(link)
        latency_us = path.latency_us if use.latency_us is None else use.latency_us
        return latency_us + use.start_us


@dataclass
class Layer:
    """What one layer has added to the graph."""

    posted: dict[Message, Op] = field(default_factory=dict)  # the put's turn on its stream
    flows: dict[Message, Op] = field(default_factory=dict)
    released: dict[Message, Op] = field(default_factory=dict)
    waits: list[tuple[Message, Op]] = field(default_factory=list)
    releases: dict[tuple[int, Block], Op] = field(default_factory=dict)
    begins: dict[int, Op] = field(default_factory=dict)  # by rank
    ends: dict[int, Op] = field(default_factory=dict)  # by rank
