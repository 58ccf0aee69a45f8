"""The ``cuda`` transport: GPUs of one machine that reach each other's memory.

Every rank maps every rank's memory (``torch.distributed._symmetric_memory``, which allocates and
exchanges handles). A put is a strided copy by a copy engine into the peer's mapping, a flag a word
there that the peer's stream waits for. NVLink multicast is not used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.comm import driver, hosts, segment, shm
from swiftfusion_xdit.comm.base import SymmetricBuffer
from swiftfusion_xdit.comm.stream import StreamBuffer, StreamCommunicator, memory_bytes
from swiftfusion_xdit.comm.watchdog import end_process
from swiftfusion_xdit.topology import Topology

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class CudaCommunicator(StreamCommunicator):
    """Ranks of ``group``, each with a GPU of its own on one host; collective to build.

    The GPU is the one that is current. Several communicators, also of groups that share ranks,
    may exist at once.

    Raises:
        ValueError: on every rank: the ranks are on several hosts, share a GPU, or have GPUs that
            cannot reach each other; ``topology`` does not place every rank; ``timeout_s`` is not
            positive.
    """

    transport = "cuda"
    addressable = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        topology: Topology,
        *,
        timeout_s: float,
        on_failure: Callable[[str], None] = end_process,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        processes = shm.meet(group, transport=self.transport)
        check_devices(group)
        super().__init__(
            group,
            topology,
            timeout_s=timeout_s,
            device=torch.device("cuda", torch.cuda.current_device()),
            processes=processes,
            board=hosts.host_board(group),
            on_failure=on_failure,
        )

    def allocate(self, num_bytes: int, *, num_flags: int) -> StreamBuffer:
        self._check_open()
        segment.check_sizes(segment.exchange(self._group, [num_bytes, num_flags]))
        size = memory_bytes(num_bytes, num_flags)
        memory, addresses, handle = self._map(size)
        buffer = StreamBuffer(
            memory,
            addresses,
            rank=self.rank,
            num_bytes=num_bytes,
            num_flags=num_flags,
            owner=handle,
        )
        self._buffers.append(buffer)
        return buffer

    def free(self, buffer: SymmetricBuffer) -> None:
        self._check_open()
        if buffer not in self._buffers:
            raise ValueError(f"the buffer must be one of this communicator's, got {buffer}")
        # No stream of any rank uses it any more once all have come here.
        torch.cuda.synchronize(self.device)
        segment.exchange(self._group, [0])
        buffer.close()
        self._buffers = [other for other in self._buffers if other is not buffer]

    def _map(self, num_bytes: int) -> tuple[Tensor, list[int], object]:
        """Collective: own memory, zeroed; where every rank's is mapped; what keeps it mapped."""
        memory: Tensor | None = None
        error: Exception | None = None
        try:
            with torch.inference_mode(False), torch.no_grad():
                memory = _allocate(num_bytes, self.device)
                memory.zero_()
            torch.cuda.synchronize(self.device)  # before any rank may put
        except RuntimeError as caught:  # torch reports what is missing in many classes
            error = caught
        self._raise_first(error, num_bytes, "cannot allocate symmetric GPU memory")
        assert memory is not None
        addresses: list[int] = []
        handle: object = None
        try:
            addresses, handle = _rendezvous(memory, self._group)
        except RuntimeError as caught:
            error = caught
        self._raise_first(error, num_bytes, "cannot map the GPU memory of the group")
        return memory, addresses, handle

    def _raise_first(self, error: Exception | None, num_bytes: int, what: str) -> None:
        """Collective: raise on every rank if any rank has an error, naming the first that has."""
        available, _ = torch.cuda.mem_get_info(self.device)
        code = 0 if error is None else _OUT_OF_MEMORY
        reports = segment.exchange(self._group, [code, available])
        for rank, (failed, their_available) in enumerate(reports):
            if failed:
                own = f"; here: {error}" if error is not None else ""
                raise OSError(
                    f"transport {self.transport}: rank {rank} {what}: {num_bytes} bytes wanted a "
                    f"rank, {their_available} bytes available on its GPU{own}"
                ) from error


def check_devices(
    group: dist.ProcessGroup, *, transport: str = "cuda", need_peers: bool = True
) -> None:
    """Collective: check that each rank has a GPU of its own and, if so needed, reaches the others'.

    Raises:
        ValueError: on every rank, naming the ranks.
    """
    if problem := find_problem(group, need_peers=need_peers):
        raise ValueError(f"transport {transport} needs {problem}")


def find_problem(group: dist.ProcessGroup, *, need_peers: bool = True) -> str:
    """Collective: what is missing for ranks to put into each other's GPUs; empty if nothing is."""
    has_gpu = torch.cuda.is_available()
    mine = driver.device_identity(torch.cuda.current_device()) if has_gpu else (0, 0)
    offers = segment.exchange(group, [int(has_gpu), *mine])
    if without := [rank for rank, offer in enumerate(offers) if not offer[0]]:
        return f"a GPU on every rank; ranks {without} have none"
    owners: dict[tuple[int, ...], int] = {}
    for rank, (_, *identity) in enumerate(offers):
        first = owners.setdefault(tuple(identity), rank)
        if first != rank and not may_share_gpu():
            return (
                f"a GPU of its own for every rank; ranks {first} and {rank} share one "
                "(torch.cuda.set_device comes before the first use)"
            )
    if not need_peers:
        return ""
    for rank, (peer,) in enumerate(segment.exchange(group, [_first_unreachable(offers)])):
        if peer >= 0:
            return (
                "GPUs that reach each other's memory (P2P over NVLink or PCIe); rank "
                f"{rank}'s cannot reach rank {peer}'s"
            )
    return ""


def may_share_gpu() -> bool:
    """Whether torch was told that ranks share a GPU: for tests, a peer is then slow, not wrong."""
    return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"


def _first_unreachable(offers: list[list[int]]) -> int:
    """The first rank whose GPU this one cannot reach, or -1. A GPU not visible here may do."""
    index_of = {identity: index for index, identity in driver.visible_devices()}
    own = torch.cuda.current_device()
    for rank, (_, high, low) in enumerate(offers):
        index = index_of.get((high, low), own)
        if index != own and not torch.cuda.can_device_access_peer(own, index):
            return rank
    return -1


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    """Memory that peers can map: uint8 ``[num_bytes]``, an allocation of its own.

    Not ``symm_mem.empty``: that may place it in a pool, at an offset that depends on what each
    rank has allocated before, and peers must find it at the same one.
    """
    import torch.distributed._symmetric_memory as symm_mem
    from torch._C._distributed_c10d import _SymmetricMemory

    if symm_mem.get_backend(device) != "CUDA":
        symm_mem.set_backend("CUDA")  # fails, with a reason, once another is in use
    return _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)


def _rendezvous(memory: Tensor, group: dist.ProcessGroup) -> tuple[list[int], object]:
    """Collective: where every rank's memory is mapped here, and the mappings' owner."""
    import torch.distributed._symmetric_memory as symm_mem

    if dist.get_world_size(group) == 1:
        return [memory.data_ptr()], None
    if hasattr(symm_mem, "enable_symm_mem_for_group"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # releases that do without it say so
            symm_mem.enable_symm_mem_for_group(group.group_name)
    handle = symm_mem.rendezvous(memory, group.group_name)
    if handle is None:
        raise RuntimeError("torch's symmetric memory does not know the allocation")
    addresses = [int(pointer) for pointer in handle.buffer_ptrs]
    if addresses[dist.get_rank(group)] != memory.data_ptr():
        raise RuntimeError("torch's symmetric memory has mapped another allocation")
    return addresses, handle
