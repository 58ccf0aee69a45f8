"""How transports use the links: what they reach, what a message costs, what they hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from swiftfusion_xdit.simulate.hardware import require_positive


@dataclass(frozen=True)
class PathUse:
    """A transport on one class of path.

    Args:
        fraction: of the path's bandwidth that the transport reaches with large messages.
        several_peers: of that, what a rank reaches whose messages go to several peers.
        start_us: what an operation costs before bytes move, beyond the link's own latency: of a
            one-sided put, or of a whole group of sends and receives.
        message_us: what each further message of such a group adds.
        latency_us: of an operation, where it is not the link's.
    """

    fraction: float = 1.0
    start_us: float = 0.0
    message_us: float = 0.0
    several_peers: float = 1.0
    latency_us: float | None = None

    def __post_init__(self) -> None:
        require_positive("path use", fraction=self.fraction, several_peers=self.several_peers)
        require_positive(
            "path use",
            allow_zero=True,
            start_us=self.start_us,
            message_us=self.message_us,
            latency_us=self.latency_us or 0.0,
        )


@dataclass(frozen=True)
class Transport:
    """A way to execute the puts of a schedule.

    Args:
        two_sided: a put is a send that its receiver joins: puts go in batches that both ends
            enter together. Otherwise a put runs on its own stream and sets a flag.
        held_units: multiprocessors that a transfer occupies at both ends.
        under_compute: fraction of its rate that a transfer keeps while either end attends.
        pack_passes: copies of what changes between rows and heads, to and from contiguous
            buffers; keys that are handed on are contiguous already.
        by_tensor: in a scatter of heads q, k, v travel one after another, each a batch.
        barriers: all ranks meet before and after each layer.
        layer_us: what a layer takes beside its steps: streams fork and join, flags are seen.
    """

    name: str
    two_sided: bool = False
    inside: PathUse = field(default_factory=PathUse)
    across: PathUse = field(default_factory=PathUse)
    held_units: int = 0
    under_compute: float = 1.0
    pack_passes: int = 0
    by_tensor: bool = False
    barriers: bool = False
    layer_us: float = 0.0

    def __post_init__(self) -> None:
        owner = f"transport {self.name}"
        require_positive(
            owner,
            allow_zero=True,
            held_units=self.held_units,
            pack_passes=self.pack_passes,
            layer_us=self.layer_us,
        )
        require_positive(owner, under_compute=self.under_compute)
        if self.held_units and not self.two_sided:
            raise ValueError(f"{owner}: one-sided transfers hold no units, got {self.held_units}")


@dataclass(frozen=True)
class Constants:
    """What no data sheet and no measurement of ours says: the simulator's free constants.

    Args:
        nccl_fraction: of the path across machines that NCCL's sends and receives reach with large
            messages. NCCL's tests on such clusters give 0.7 to 0.9.
        nccl_under_compute: of its rate that an NCCL transfer keeps while an attention kernel runs
            at either end: its kernels share units and memory with attention, and its proxy paces
            them. On two H200, xDiT's ring takes about as long as if nothing overlapped.
        one_sided_fraction: of the path across that NVSHMEM's puts reach; its proxy posts each
            message, and first-generation EFA has no remote write in hardware.
    """

    nccl_fraction: float = 0.8
    nccl_under_compute: float = 0.25
    one_sided_fraction: float = 0.65


CONSTANTS = Constants()
# Measured on two H200 with `all_to_all_single`: 45 us up to 2 MiB crossing, 144 us for 32 MiB. That
# is 33 us beyond the link's latency, then 0.81 of what copy engines reach.
NCCL_START_US = 33.0
NCCL_INSIDE = PathUse(0.81, NCCL_START_US)
# Four H200 that push 24 MiB to three peers in turn reach 207 to 211 GB/s each, 230 to 241 in step,
# where to one they reach 358 to 362; 6 MiB, 227 to 240 and 319 to 325. One alone that pushes 24 MiB
# to three reaches 362 to 366: the links are shared, not the engine
# (benchmarks/results/peer_copies.json).
ONE_SIDED_INSIDE = PathUse(several_peers=0.57)
# By a kernel of few blocks, for short puts of fused layers, to all peers at once: alone it reaches
# 0.66 to 0.8, but no peer's rows are there before the others'. So FLUX 1024 on four H200 takes the
# 226 us that it took (benchmarks/results/puts_by_kernel.md).
BY_KERNEL_INSIDE = PathUse(0.54, latency_us=0.3)
# Between the kernels of two layers, on two H100 in a CUDA graph. A fused one gives slots back.
ONE_SIDED_LAYER_US, FUSED_LAYER_US = 20.0, 8.0
NCCL_UNITS = 16  # blocks of a point-to-point kernel


def one_sided(constants: Constants = CONSTANTS, *, barriers: bool = False) -> Transport:
    """Copy engines inside a machine, NVSHMEM puts across."""
    across = PathUse(constants.one_sided_fraction)
    return Transport(
        "one-sided",
        inside=ONE_SIDED_INSIDE,
        across=across,
        barriers=barriers,
        layer_us=ONE_SIDED_LAYER_US,
    )


def with_kernel_puts(transport: Transport) -> Transport:
    """Puts inside a machine by a kernel beside the fused call that needs those of others."""
    return dataclasses.replace(transport, inside=BY_KERNEL_INSIDE)


def nccl(constants: Constants = CONSTANTS) -> Transport:
    """The same schedules over sends and receives: what is not contiguous is copied at one end."""
    across = PathUse(constants.nccl_fraction, NCCL_START_US)
    return Transport(
        "nccl",
        two_sided=True,
        inside=NCCL_INSIDE,
        across=across,
        held_units=NCCL_UNITS,
        under_compute=constants.nccl_under_compute,
        pack_passes=1,
    )


def stock(constants: Constants = CONSTANTS) -> Transport:
    """xDiT's USP: an all-to-all for each of q, k, v and out, copied at both ends; ring by NCCL."""
    return dataclasses.replace(nccl(constants), name="stock", pack_passes=2, by_tensor=True)
