"""Transports: symmetric buffers with put, get, signal and wait over different kinds of links."""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import segment
from swiftfusion_xdit.comm.base import (
    Communicator,
    Counters,
    Flag,
    PeerTimeout,
    Region,
    SymmetricBuffer,
    Transfer,
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
    "Transfer",
    "create_communicator",
]

TRANSPORTS = ("auto", "shm", "cuda", "nvshmem", "nccl")


def create_communicator(
    name: str,
    group: dist.ProcessGroup,
    topology: Topology,
    *,
    timeout_s: float,
    device: torch.device | str | None = None,
) -> Communicator:
    """Collective: the communicator of the ranks of ``group``.

    Args:
        name: one of ``TRANSPORTS``. ``auto`` is ``shm`` for tensors on the CPU; for tensors on
            GPUs ``cuda`` where all ranks are on one host and reach each other's memory, else
            ``nvshmem`` where every rank can import it, else ``nccl``.
        topology: places the ranks of the group on machines, for the counters.
        timeout_s: bounds every wait.
        device: where the tensors live; by default the current GPU if the group's backend is NCCL,
            else the CPU.

    Raises:
        ValueError: ``name`` is unknown, or the transport cannot serve these ranks.
        ImportError: a package that the transport needs is missing; the message has the command.
    """
    if name not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {name!r}")
    if device is None:
        device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    on_gpu = torch.device(device).type == "cuda"
    if name == "auto":
        name = _choose(group) if on_gpu else "shm"
    if on_gpu == (name == "shm"):
        where = "the CPU" if name == "shm" else "GPUs"
        raise ValueError(
            f"transport {name!r} serves tensors on {where}, got device={str(device)!r}"
        )
    # Imported where they are chosen: each needs what only its own users have.
    if name == "cuda":
        from swiftfusion_xdit.comm.cuda import CudaCommunicator

        return CudaCommunicator(group, topology, timeout_s=timeout_s)
    if name == "nvshmem":
        from swiftfusion_xdit.comm.nvshmem import NvshmemCommunicator

        return NvshmemCommunicator(group, topology, timeout_s=timeout_s)
    if name == "nccl":
        from swiftfusion_xdit.comm.nccl import NcclCommunicator

        return NcclCommunicator(group, topology, timeout_s=timeout_s)
    return ShmCommunicator(group, topology, timeout_s=timeout_s)


def _choose(group: dist.ProcessGroup) -> str:
    """Collective: the transport for the GPUs of these ranks."""
    from swiftfusion_xdit.comm import cuda, hosts

    if hosts.one_host(group) and not cuda.find_problem(group):
        return "cuda"
    has_nvshmem = importlib.util.find_spec("nvshmem") is not None
    everywhere = all(has for (has,) in segment.exchange(group, [int(has_nvshmem)]))
    return "nvshmem" if everywhere else "nccl"
