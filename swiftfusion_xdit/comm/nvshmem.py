"""The ``nvshmem`` transport: GPUs of several machines, over NVSHMEM's symmetric heap.

Peers whose memory can be mapped (NVLink, P2P) are served like those of ``cuda``: copy engines and
stream-written flags. For the others a put is packed into contiguous staging in the heap and sent
with its signal (``nvshmemx_putmem_signal_on_stream``); where the slot is not contiguous it arrives
in staging too, and the wait for its flag unpacks it. Those slots are known from ``bind``.

NVSHMEM is initialised once per process, over all ranks of ``torch.distributed``, by a unique id
that rank 0 draws; where torch has initialised it already, that is used. Allocations are collective
over all ranks: groups that work side by side allocate and free in step, with the same sizes.

Across machines NVSHMEM's remote transport is chosen by its own variables: NVSHMEM_REMOTE_TRANSPORT
``ibrc`` (default) or ``ibgda`` for InfiniBand and RoCE (NVSHMEM_IB_GID_INDEX for RoCE v2, and
NVSHMEM_HCA_LIST to name NICs), ``libfabric`` with NVSHMEM_LIBFABRIC_PROVIDER=efa for EFA. On a
single machine none is needed. The heap grows as needed; NVSHMEM_SYMMETRIC_SIZE bounds it where
CUDA's virtual memory management is off.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.comm import cuda, hosts, segment
from swiftfusion_xdit.comm.base import Flag, SymmetricBuffer, Transfer
from swiftfusion_xdit.comm.stream import StreamBuffer, StreamCommunicator, memory_bytes
from swiftfusion_xdit.comm.watchdog import end_process
from swiftfusion_xdit.region import Region
from swiftfusion_xdit.topology import Topology

logger = logging.getLogger(__name__)

MIN_VERSION = (3, 2)
STAGING_ALIGNMENT = 256
FINALIZE_TIMEOUT_S = 30.0

_INSTALL = "pip install nvshmem4py-cu13 cuda-core (nvshmem4py-cu12 for CUDA 12)"
_STATUS_IS_INITIALIZED = 2


@dataclass(frozen=True)
class _Remote:
    """A transfer with a peer whose memory is not mapped: where it is staged at either end."""

    transfer: Transfer
    outbox: int  # offset at the sender, in the staging of every rank
    inbox: int | None  # offset at the receiver; None: straight into its slot


class NvshmemBuffer(StreamBuffer):
    """A buffer of the heap, with the staging of its remote transfers once they are bound."""

    staging = 0
    staging_memory: Tensor | None = None

    def __init__(self, memory: Tensor, addresses: Sequence[int], **sizes: Any) -> None:
        super().__init__(memory, addresses, **sizes)
        self.base = memory.data_ptr()
        self.outgoing: dict[tuple[int, Region], _Remote] = {}
        self.incoming: dict[int, _Remote] = {}
        self.waiting: dict[int, list[tuple[int, int, int]]] = {}  # puts not sent yet, by peer

    def stage(self, offset: int, region: Region) -> Tensor:
        """A contiguous tensor of a region's shape in the staging."""
        assert self.staging_memory is not None
        window = self.staging_memory[offset : offset + region.num_bytes]
        return window.view(region.dtype).view(region.shape)


class NvshmemCommunicator(StreamCommunicator):
    """Ranks of ``group``, each with a GPU of its own; collective over all ranks of the job.

    Args:
        map_peers: False serves every peer like one on another machine; for tests.

    Raises:
        ImportError: nvshmem4py is missing; the message has the command.
        RuntimeError: its library is too old, or another NVSHMEM than torch's was loaded.
        ValueError: on every rank: a rank has no GPU, or two share one.
    """

    transport = "nvshmem"

    def __init__(
        self,
        group: dist.ProcessGroup,
        topology: Topology,
        *,
        timeout_s: float,
        map_peers: bool = True,
        on_failure: Callable[[str], None] = end_process,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        cuda.check_devices(group, transport=self.transport, need_peers=False)
        self._library = initialize()
        super().__init__(
            group,
            topology,
            timeout_s=timeout_s,
            device=torch.device("cuda", torch.cuda.current_device()),
            processes=hosts.watch_processes(group),
            board=hosts.make_board(group),
            on_failure=on_failure,
        )
        self._map_peers = map_peers
        self._pes = [dist.get_global_rank(group, peer) for peer in range(self.size)]
        probe = self.allocate(0, num_flags=0)
        mapped = all(probe.is_mapped(peer) for peer in range(self.size))
        self.free(probe)
        # Then layers are compiled, as for `cuda`.
        self.addressable = all(each for (each,) in segment.exchange(group, [int(mapped)]))

    def allocate(self, num_bytes: int, *, num_flags: int) -> NvshmemBuffer:
        self._check_open()
        segment.check_sizes(segment.exchange(self._group, [num_bytes, num_flags]))
        size = memory_bytes(num_bytes, num_flags)
        base = self._malloc(size)
        addresses = [
            self._library.ptr(base, pe) if self._map_peers or peer == self.rank else 0
            for peer, pe in enumerate(self._pes)
        ]
        memory = _tensor_at(base, size, self.device)
        memory.zero_()
        buffer = NvshmemBuffer(
            memory, addresses, rank=self.rank, num_bytes=num_bytes, num_flags=num_flags
        )
        torch.cuda.synchronize(self.device)
        segment.exchange(self._group, [0])  # nobody puts before all memory is zero
        self._buffers.append(buffer)
        return buffer

    def free(self, buffer: SymmetricBuffer) -> None:
        self._check_open()
        if buffer not in self._buffers:
            raise ValueError(f"the buffer must be one of this communicator's, got {buffer}")
        assert isinstance(buffer, NvshmemBuffer)
        torch.cuda.synchronize(self.device)
        segment.exchange(self._group, [0])
        buffer.close()
        for address in filter(None, (buffer.staging, buffer.base)):
            self._library.free(address)  # collective in NVSHMEM
        buffer.staging_memory = None
        self._buffers = [other for other in self._buffers if other is not buffer]

    def _malloc(self, num_bytes: int) -> int:
        """Collective over all ranks of the job: heap memory, at one offset on all of them.

        Raises:
            ValueError: groups that allocate side by side disagree about the size.
            OSError: the heap has no room.
        """
        world = dist.group.WORLD
        assert world is not None
        sizes = segment.exchange(world, [num_bytes])
        if len({size for (size,) in sizes}) > 1:
            raise ValueError(
                "transport nvshmem allocates over all ranks of the job at once, so groups that "
                f"work side by side need equal shapes; got {[size for (size,) in sizes]} bytes"
            )
        try:
            address = self._library.malloc(num_bytes)
        except Exception as error:  # bindings raise classes of their own
            raise OSError(
                f"transport nvshmem: cannot allocate {num_bytes} bytes: {error}"
            ) from error
        if not address:
            raise OSError(
                f"transport nvshmem: the symmetric heap has no room for {num_bytes} bytes; "
                "NVSHMEM_SYMMETRIC_SIZE sets its size"
            )
        return address

    def bind(self, buffer: SymmetricBuffer, transfers: Sequence[Transfer]) -> None:
        """As in the base class; collective over the job where any peer's memory is not mapped."""
        assert isinstance(buffer, NvshmemBuffer)
        mapped = [int(buffer.is_mapped(peer)) for peer in range(self.size)]
        everyone = segment.exchange(self._group, mapped)
        ends = [0] * self.size
        remotes = []
        for transfer in transfers:
            if everyone[transfer.src][transfer.dst] or not transfer.region.num_bytes:
                continue
            step = -(-transfer.region.num_bytes // STAGING_ALIGNMENT) * STAGING_ALIGNMENT
            outbox, inbox = ends[transfer.src], None
            ends[transfer.src] += step
            if not _is_contiguous(transfer.region):
                inbox = ends[transfer.dst]
                ends[transfer.dst] += step
            remotes.append(_Remote(transfer, outbox, inbox))
        for remote in remotes:
            if remote.transfer.src == self.rank:
                buffer.outgoing[remote.transfer.dst, remote.transfer.region] = remote
            if remote.transfer.dst == self.rank:
                buffer.incoming[remote.transfer.full_flag] = remote
        world = dist.group.WORLD
        assert world is not None
        num_bytes = max(size for (size,) in segment.exchange(world, [max(ends)]))
        if num_bytes:
            buffer.staging = self._malloc(num_bytes)
            buffer.staging_memory = _tensor_at(buffer.staging, num_bytes, self.device)

    def put(self, src: Tensor, buffer: SymmetricBuffer, region: Region, peer: int) -> None:
        assert isinstance(buffer, NvshmemBuffer)
        if buffer.is_mapped(peer):
            super().put(src, buffer, region, peer)
            return
        self._check_source(src, region)
        if not region.num_bytes:
            return
        remote = buffer.outgoing.get((peer, region))
        if remote is None:
            raise ValueError(f"no transfer to rank {peer} into {region} was bound")
        packed = buffer.stage(remote.outbox, region)
        packed.copy_(src.detach())
        self._keep(src)
        if remote.inbox is None:
            target = buffer.base + region.offset_bytes
        else:
            target = buffer.staging + remote.inbox
        # Goes out with the next signal to this peer, as one operation.
        buffer.waiting.setdefault(peer, []).append((target, packed.data_ptr(), region.num_bytes))
        self.counters.add(self._links[peer], region.num_bytes)

    def signal(self, buffer: SymmetricBuffer, flag_index: int, peer: int) -> None:
        """Set a peer's flag. At a peer on another machine it orders the puts since the last one."""
        assert isinstance(buffer, NvshmemBuffer)
        if buffer.is_mapped(peer):
            super().signal(buffer, flag_index, peer)
            return
        library, stream, pe = self._library, self._stream(), self._pes[peer]
        # Flags are 64 bytes apart, so each is also a 64-bit signal word with an upper half of 0.
        word = buffer.flag_address(flag_index, self.rank)
        *earlier, last = buffer.waiting.pop(peer, None) or [(0, 0, 0)]
        for target, source, num_bytes in earlier:
            library.putmem_on_stream(target, source, num_bytes, pe, stream)
        if earlier:
            library.quiet_on_stream(stream)
        target, source, num_bytes = last
        operation = int(library.Signal_op.SIGNAL_SET)
        if num_bytes:
            library.putmem_signal_on_stream(
                target, source, num_bytes, word, 1, operation, pe, stream
            )
        else:
            library.signal_op_on_stream(word, 1, operation, pe, stream)

    def wait(
        self,
        buffer: SymmetricBuffer,
        flag: Flag,
        peer: int,
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        assert isinstance(buffer, NvshmemBuffer)
        if buffer.is_mapped(peer):
            super().wait(buffer, flag, peer, on_wait=on_wait)
            return
        self._check_peer(peer)
        library, stream = self._library, self._stream()
        word = buffer.flag_address(flag.index, self.rank)
        lane = self.heartbeat.stream_lane_address(stream)
        buffer.flag_names.setdefault(flag.index, (flag, peer))
        self._driver.note32(stream, lane, buffer.wait_token(flag.index))
        library.signal_wait_until_on_stream(word, int(library.Cmp_type.CMP_EQ), 1, stream)
        self._driver.write32(stream, word, 0)
        self._driver.note32(stream, lane, 0)
        remote = buffer.incoming.get(flag.index)
        if remote is not None and remote.inbox is not None:
            region = remote.transfer.region
            buffer.view(region).copy_(buffer.stage(remote.inbox, region))

    def get(self, buffer: SymmetricBuffer, region: Region, peer: int) -> Tensor:
        assert isinstance(buffer, NvshmemBuffer)
        if not buffer.is_mapped(peer):
            raise NotImplementedError(f"get from rank {peer}, whose memory cannot be mapped here")
        return super().get(buffer, region, peer)


_library: Any = None


def initialize() -> Any:
    """Collective over all ranks: NVSHMEM's bindings, initialised; once per process.

    Raises:
        ImportError, RuntimeError: see ``NvshmemCommunicator``.
    """
    global _library
    if _library is not None:
        return _library
    library, core = _import()
    rank, size = dist.get_rank(), dist.get_world_size()
    if library.init_status() >= _STATUS_IS_INITIALIZED:
        if (library.my_pe(), library.n_pes()) != (rank, size):
            raise RuntimeError(
                f"NVSHMEM is already initialised as PE {library.my_pe()} of {library.n_pes()}, "
                f"and not as rank {rank} of {size} of torch.distributed"
            )
    else:
        _initialize(core, rank, size)
    _library = library
    return library


def _initialize(core: Any, rank: int, size: int) -> None:
    from cuda.core import Device

    world = dist.group.WORLD
    assert world is not None
    device = Device(torch.cuda.current_device())
    device.set_current()
    unique_id = core.get_unique_id(empty=rank != 0)
    raw = unique_id._data.view("int64")
    mine = raw.tolist() if rank == 0 else [0] * raw.size
    raw[:] = segment.exchange(world, mine)[0]
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")  # nothing here uses NVLink's multicast
    core.init(device=device, uid=unique_id, rank=rank, nranks=size, initializer_method="uid")
    atexit.register(_Finalizer(core, torch.cuda.current_device()).run)


class _Finalizer:
    """Gives NVSHMEM's resources back at exit.

    All ranks must come to it for it to end. One that fails does not, so nobody waits for long: a
    thread does the work. It starts now, because Python may start none once the process ends.
    """

    def __init__(self, core: Any, device: int) -> None:
        self._core = core
        self._device = device
        self._due = threading.Event()
        self._thread = threading.Thread(
            target=self._finalize, name="swiftfusion-nvshmem", daemon=True
        )
        self._thread.start()

    def run(self) -> None:
        global _library
        failing = hasattr(sys, "last_value")  # an exception that nobody caught
        if _library is None or failing:
            return
        _library = None
        self._due.set()
        self._thread.join(FINALIZE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("NVSHMEM did not finalise within %g s", FINALIZE_TIMEOUT_S)

    def _finalize(self) -> None:
        self._due.wait()
        try:
            torch.cuda.set_device(self._device)  # of this thread: NVSHMEM's streams live there
            torch.cuda.synchronize()
            self._core.finalize()
        except Exception as error:  # the process ends anyway, with the status that it has
            logger.warning("NVSHMEM did not finalise: %s", error)


def _import() -> tuple[Any, Any]:
    """The bindings and the core package, checked against what torch has loaded."""
    try:
        import nvshmem.bindings as library
        import nvshmem.core as core
    except ImportError as error:
        raise ImportError(f"transport nvshmem needs nvshmem4py: {_INSTALL}; {error}") from error
    try:
        version = core.get_version()
    except Exception as error:
        raise RuntimeError(
            f"transport nvshmem: nvshmem4py cannot use the NVSHMEM library that it finds: {error}"
        ) from error
    found = tuple(int(part) for part in version.libnvshmem_version.split(".")[:2])
    loaded = loaded_libraries()
    if found < MIN_VERSION or len(loaded) > 1:
        wanted = ".".join(map(str, MIN_VERSION))
        raise RuntimeError(
            f"transport nvshmem needs one NVSHMEM library, {wanted} or newer, in the process: "
            f"nvshmem4py {version.nvshmem4py_version} uses {version.libnvshmem_version}; loaded "
            f"are {', '.join(loaded) or 'none'}. Install the nvidia-nvshmem package that torch "
            "depends on, and no other"
        )
    return library, core


def loaded_libraries(maps: str = "/proc/self/maps") -> list[str]:
    """Paths of the NVSHMEM host libraries that are loaded."""
    paths = {line.split(maxsplit=5)[-1] for line in Path(maps).read_text().splitlines()}
    return sorted(path for path in paths if "libnvshmem_host" in Path(path).name)


def _is_contiguous(region: Region) -> bool:
    expected = 1
    for length, step in zip(reversed(region.shape), reversed(region.stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


class _Memory:
    """Device memory that somebody else owns, as torch takes it in without a copy."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _tensor_at(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """A uint8 tensor over memory that is mapped here, on ``device``, also if it is a peer's."""
    with torch.inference_mode(False):
        return torch.as_tensor(_Memory(address, num_bytes), device=device)
