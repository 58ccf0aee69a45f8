"""What an adapter for another project's sequence parallelism offers to the benchmark."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swiftfusion_xdit.cli.bench_config import Shape
from swiftfusion_xdit.cli.bench_stock import NotRunnable

Layer = Callable[[], Tensor]
HOST_SYNC = "each call reads lengths back to the host, which a capture cannot hold"


@dataclass(frozen=True)
class Setting:
    """Where a peer would run. ``backends``: the local kernels that the benchmark was asked for."""

    device: str
    ranks: int
    backends: tuple[str, ...]

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def hybrids(self) -> list[tuple[int, int]]:
        """Every (ulysses, ring) whose product is the number of ranks, most Ulysses first."""
        return [(u, self.ranks // u) for u in range(self.ranks, 0, -1) if self.ranks % u == 0]


@dataclass(frozen=True)
class Mode:
    """One way to run a peer.

    Args:
        name: what tells it from the peer's other modes.
        backend: the local kernel as ``--backends`` names it, for the ratio to its floor.
        kernel: the same in the peer's own words.
        options: further switches, in the adapter's own words.
        reason: why it does not run at all; empty if it may.
        graph_reason: why no CUDA graph is tried; empty if one is.
        max_error: what is rounding for this mode, where it rounds more than its dtype does.
    """

    name: str
    backend: str = ""
    kernel: str = ""
    ulysses: int = 1
    ring: int = 1
    options: tuple[str, ...] = ()
    reason: str = ""
    graph_reason: str = ""
    max_error: float | None = None


class Peer(ABC):
    """One project, at one version. Imports the project only when a layer is made."""

    name: ClassVar[str]
    package: ClassVar[str]  # as pip names it
    module: ClassVar[str]  # as Python imports it

    def version(self) -> str | None:
        """The version that is measured; None if it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def reason(self, setting: Setting) -> str | None:
        """Why nothing of this peer can run here, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install {self.package}"
        return None

    @abstractmethod
    def modes(self, setting: Setting) -> list[Mode]:
        """Every mode of this peer for these ranks, also those that only have a reason."""

    @abstractmethod
    def layer(self, mode: Mode, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Layer:
        """The function that runs one layer over the default process group. Collective.

        q, k, v: this rank's rows ``[B, S / ranks, H, D]``; the function returns the same layout.

        Raises:
            NotRunnable: the mode does not run on such a layer; every rank finds the same.
        """

    def activate(self, mode: Mode) -> None:  # noqa: B027
        """Put in place what is global to the process before ``mode`` has its turn."""


@cache
def hybrid_mesh(device: str, ulysses: int, ring: int) -> DeviceMesh:
    """All ranks as ``ring`` x ``ulysses``, Ulysses among neighbours. Collective the first time.

    Peers share it, because every mesh has communicators of its own.
    """
    return init_device_mesh(device, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))


def require_even(shape: Shape, *, ranks: int, ulysses: int) -> None:
    """Raises NotRunnable where rows or heads do not divide."""
    if shape.rows % ranks:
        raise NotRunnable(f"{shape.rows} rows do not divide by {ranks} ranks, as it needs")
    if shape.heads % ulysses:
        raise NotRunnable(f"{shape.heads} heads do not divide by the Ulysses degree {ulysses}")
