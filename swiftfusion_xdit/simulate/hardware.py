"""What a cluster is to the simulator: rates and latencies, as frozen values.

Every number is a fact of a datasheet or of a measurement; nothing here knows a schedule. Presets,
YAML files and detection build these values elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from swiftfusion_xdit.topology import Topology

US_PER_S = 1e6
BYTES_PER_US = 1e3  # 1 GB/s moves 1e9 bytes a second: 1000 bytes a microsecond


def require_positive(owner: str, *, allow_zero: bool = False, **values: float) -> None:
    """Check rates, sizes and latencies where they enter.

    Raises:
        ValueError: a value is not a finite number, is negative, or is zero where it may not be.
    """
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (
            not is_number
            or not math.isfinite(value)
            or value < 0
            or (value == 0 and not allow_zero)
        ):
            bound = "at least 0" if allow_zero else "above 0"
            raise ValueError(f"{owner}: {name} must be a number {bound}, got {value!r}")


@dataclass(frozen=True)
class Link:
    """A path in one direction: a message of n bytes alone takes latency + n / bandwidth.

    So bandwidth grows with message size: half of ``gb_per_s`` is reached at
    ``latency_us * gb_per_s`` kilobytes.
    """

    gb_per_s: float
    latency_us: float

    def __post_init__(self) -> None:
        require_positive("link", gb_per_s=self.gb_per_s)
        require_positive("link", allow_zero=True, latency_us=self.latency_us)

    def time_us(self, num_bytes: float) -> float:
        """One message alone on the link."""
        return self.latency_us + num_bytes / (self.gb_per_s * BYTES_PER_US)

    def effective_gb_per_s(self, num_bytes: float) -> float:
        """What one message alone gets, latency included."""
        return num_bytes / self.time_us(num_bytes) / BYTES_PER_US


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        num_units: multiprocessors; an attention kernel's 128-row tiles run on one each.
        attention_tflops: (head dim, TFLOP/s) pairs of the attention kernel with full waves;
            a head dim between two of them takes the one below, or the lowest.
        gemm_tflops: large dense matrix products, as reached, not as advertised.
        memory_gb_per_s: what a streaming copy reaches, read plus write.
        memory_gib: capacity.
        num_copy_engines: copies to peers that run at the same time.
        kernel_us: from one kernel to the next of a stream: launch and drain.
    """

    name: str
    num_units: int
    attention_tflops: tuple[tuple[int, float], ...]
    gemm_tflops: float
    memory_gb_per_s: float
    memory_gib: float
    num_copy_engines: int = 2
    kernel_us: float = 3.0

    def __post_init__(self) -> None:
        if not self.attention_tflops:
            raise ValueError(f"gpu {self.name}: attention_tflops must name at least one head dim")
        require_positive(
            f"gpu {self.name}",
            num_units=self.num_units,
            gemm_tflops=self.gemm_tflops,
            memory_gb_per_s=self.memory_gb_per_s,
            memory_gib=self.memory_gib,
            num_copy_engines=self.num_copy_engines,
        )
        require_positive(f"gpu {self.name}", allow_zero=True, kernel_us=self.kernel_us)
        for head_dim, tflops in self.attention_tflops:
            require_positive(f"gpu {self.name}", head_dim=head_dim, attention_tflops=tflops)

    def attention_rate(self, head_dim: int) -> float:
        """TFLOP/s of the attention kernel at a head dim."""
        known = sorted(self.attention_tflops)
        return max((pair for pair in known if pair[0] <= head_dim), default=known[0])[1]


@dataclass(frozen=True)
class Cluster:
    """Equal machines of equal GPUs.

    Args:
        inside: one GPU's path to the other GPUs of its machine, each direction.
        across: one machine's path to the other machines, each direction, shared by its GPUs;
            None only for one machine.
        across_gb_per_s_per_gpu: what one GPU alone can get of ``across`` (its own NICs); None:
            all of it.
    """

    name: str
    gpu: Gpu
    num_machines: int
    gpus_per_machine: int
    inside: Link
    across: Link | None = None
    across_gb_per_s_per_gpu: float | None = None

    def __post_init__(self) -> None:
        owner = f"cluster {self.name}"
        require_positive(
            owner, num_machines=self.num_machines, gpus_per_machine=self.gpus_per_machine
        )
        if self.num_machines > 1 and self.across is None:
            raise ValueError(f"{owner}: across is missing, but there are several machines")
        if self.across_gb_per_s_per_gpu is not None:
            require_positive(owner, across_gb_per_s_per_gpu=self.across_gb_per_s_per_gpu)

    @property
    def num_ranks(self) -> int:
        return self.num_machines * self.gpus_per_machine

    @property
    def topology(self) -> Topology:
        """Ranks in machine order."""
        return Topology.split(self.num_ranks, self.num_machines)
