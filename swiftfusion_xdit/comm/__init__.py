"""Transports: symmetric buffers with put, get, signal and wait over different kinds of links."""

from __future__ import annotations

import torch.distributed as dist

from swiftfusion_xdit.comm.base import (
    Communicator,
    Counters,
    Flag,
    PeerTimeout,
    Region,
    SymmetricBuffer,
)
from swiftfusion_xdit.comm.shm import ShmCommunicator
from swiftfusion_xdit.topology import Topology

__all__ = [
    "TRANSPORTS",
    "Communicator",
    "Counters",
    "Flag",
    "PeerTimeout",
    "Region",
    "ShmCommunicator",
    "SymmetricBuffer",
    "create_communicator",
]

TRANSPORTS = ("auto", "shm", "cuda", "nvshmem", "nccl")


def create_communicator(
    name: str, group: dist.ProcessGroup, topology: Topology, *, timeout_s: float
) -> Communicator:
    """Collective: the communicator of the ranks of ``group``; ``auto`` is ``shm``.

    ``topology`` places the ranks of the group on machines and ``timeout_s`` bounds every wait.

    Raises:
        ValueError: ``name`` is unknown, or the transport cannot serve these ranks.
        NotImplementedError: the transport is not available in this version.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {name!r}")
    if name not in ("auto", "shm"):
        raise NotImplementedError(
            f"transport {name!r} is not available in this version; shm is (ranks of one host)"
        )
    return ShmCommunicator(group, topology, timeout_s=timeout_s)
