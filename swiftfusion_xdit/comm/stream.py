"""Communication in stream order, over memory of the peers that is mapped here.

What transports on GPUs share. Each call is enqueued on the CUDA stream that is current, and
returns at once; all of it can be captured in a CUDA graph. Data moves by copy engines, flags are
32-bit words that streams write and await: no kernel runs for either.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.comm import driver
from swiftfusion_xdit.comm.base import Communicator, Flag, SymmetricBuffer
from swiftfusion_xdit.comm.board import Board
from swiftfusion_xdit.comm.driver import copy_shape
from swiftfusion_xdit.comm.heartbeat import MAX_BUFFERS, Heartbeat, wait_token
from swiftfusion_xdit.comm.hosts import StoreBoard
from swiftfusion_xdit.comm.process import PeerProcess
from swiftfusion_xdit.comm.watchdog import Watchdog, end_process
from swiftfusion_xdit.region import Region
from swiftfusion_xdit.topology import Topology

FLAG_BYTES = 64  # keeps flags in cache lines of their own
DATA_ALIGNMENT = 256

_MAX_VIEWS = 4096


def flags_offset(num_bytes: int) -> int:
    """Where the flags begin in a rank's memory: behind the data."""
    return -(-num_bytes // DATA_ALIGNMENT) * DATA_ALIGNMENT


def memory_bytes(num_bytes: int, num_flags: int) -> int:
    """Bytes of data and flags together; never 0, which no allocator likes."""
    return max(flags_offset(num_bytes) + num_flags * FLAG_BYTES, DATA_ALIGNMENT)


class StreamBuffer(SymmetricBuffer):
    """This rank's handle of a symmetric buffer on GPUs.

    ``memory`` is this rank's own: uint8, data then flags. ``addresses`` says where the memory of
    every rank is mapped here, 0 where it cannot be. ``owner`` is what keeps the mappings.
    """

    flag_stride = FLAG_BYTES
    _numbers = itertools.count(1)

    def __init__(
        self,
        memory: Tensor,
        addresses: Sequence[int],
        *,
        rank: int,
        num_bytes: int,
        num_flags: int,
        owner: object = None,
    ) -> None:
        assert addresses[rank] == memory.data_ptr(), f"{addresses}, own {memory.data_ptr():#x}"
        self.num_bytes = num_bytes
        self.num_flags = num_flags
        self.flag_names: dict[int, tuple[Flag, int]] = {}
        self.number = next(StreamBuffer._numbers) % MAX_BUFFERS + 1
        self._rank = rank
        self._memory: Tensor | None = memory
        self._addresses = list(addresses)
        self._owner = owner
        self._flags_offset = flags_offset(num_bytes)
        self._views: dict[Region, Tensor] = {}

    @property
    def local(self) -> Tensor:
        self._check(self._rank)
        assert self._memory is not None
        return self._memory[: self.num_bytes]

    def is_mapped(self, peer: int) -> bool:
        """Whether this rank's GPU can write to the memory of ``peer``."""
        self._check(peer)
        return self._addresses[peer] != 0

    def address(self, peer: int) -> int:
        """Where the data of ``peer`` begins, as mapped here.

        Raises:
            RuntimeError: the buffer is closed.
            ValueError: ``peer`` is not a rank, or its memory cannot be mapped here.
        """
        if not self.is_mapped(peer):
            raise ValueError(f"the memory of rank {peer} is not mapped at rank {self._rank}")
        return self._addresses[peer]

    def region_address(self, region: Region, peer: int) -> int:
        """Where a region of the peer's data begins, as mapped here."""
        if region.end_bytes > self.num_bytes:
            raise ValueError(
                f"region must end within the buffer: ends at byte {region.end_bytes} of "
                f"{self.num_bytes} ({region})"
            )
        return self.address(peer) + region.offset_bytes

    def flag_address(self, index: int, peer: int) -> int:
        """Where a flag of ``peer``, a uint32, is mapped here; 1 is set and 0 is clear."""
        if not 0 <= index < self.num_flags:
            raise ValueError(f"flag index must be in [0, {self.num_flags}), got {index}")
        return self.address(peer) + self._flags_offset + index * FLAG_BYTES

    def flag_base(self) -> int:
        """Address of this rank's first flag; 0 if the buffer is closed."""
        return 0 if self._memory is None else self._addresses[self._rank] + self._flags_offset

    def wait_token(self, index: int) -> int:
        """What a program notes in its lane while it waits for a flag (``heartbeat.py``)."""
        return wait_token(self.number, index)

    def view(self, region: Region) -> Tensor:
        """``region`` of this rank's memory; kept, since a schedule asks for the same ones again."""
        view = self._views.get(region)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            # Made in inference mode it could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                view = self._views[region] = region.view(self.local)
        return view

    def close(self) -> None:
        self._memory = None
        self._views = {}
        self._owner = None

    def _check(self, peer: int) -> None:
        if self._memory is None:
            raise RuntimeError(f"the symmetric buffer of {self.num_bytes} bytes is closed")
        if not 0 <= peer < len(self._addresses):
            raise ValueError(f"peer must be a rank in [0, {len(self._addresses)}), got {peer}")


class StreamCommunicator(Communicator):
    """Puts, flags and reports on streams; a subclass allocates.

    Counters count what is enqueued; a replay of a captured graph is not seen. ``on_failure`` gets
    the watchdog's report; by default it ends the process.
    """

    on_stream = True
    transport = ""

    def __init__(
        self,
        group: dist.ProcessGroup,
        topology: Topology,
        *,
        timeout_s: float,
        device: torch.device,
        processes: Sequence[PeerProcess],
        board: Board | StoreBoard,
        on_failure: Callable[[str], None] = end_process,
    ) -> None:
        super().__init__(
            rank=dist.get_rank(group), size=dist.get_world_size(group), topology=topology
        )
        self.device = device
        self.timeout_s = timeout_s
        self._group = group
        self._driver = driver.load()
        self._links = [topology.link(self.rank, peer) for peer in range(self.size)]
        self._buffers: list[StreamBuffer] = []
        self._processes = processes
        self._board: Board | StoreBoard | None = board
        self._closed = False
        self.layer_context = ""  # what the device is doing, for the watchdog's report
        self.heartbeat = Heartbeat(device, lambda: list(self._buffers))
        self.watchdog = Watchdog(
            self.heartbeat,
            processes,
            rank=self.rank,
            timeout_s=timeout_s,
            context=lambda: self.layer_context,
            on_failure=on_failure,
        )
        self.watchdog.start()

    @abstractmethod
    def allocate(self, num_bytes: int, *, num_flags: int) -> StreamBuffer:
        """As in the base class; closes over all streams of the device."""

    def put(self, src: Tensor, buffer: SymmetricBuffer, region: Region, peer: int) -> None:
        assert isinstance(buffer, StreamBuffer)
        self._check_source(src, region)
        dst = buffer.region_address(region, peer)
        shape = copy_shape(region.shape, src.stride(), region.stride, src.element_size())
        self._driver.copy(self._stream(), dst, src.data_ptr(), shape)
        self._keep(src)
        self.counters.add(self._links[peer], region.num_bytes)

    def get(self, buffer: SymmetricBuffer, region: Region, peer: int) -> Tensor:
        assert isinstance(buffer, StreamBuffer)
        src = buffer.region_address(region, peer)
        out = torch.empty(region.shape, dtype=region.dtype, device=self.device)
        shape = copy_shape(region.shape, region.stride, out.stride(), out.element_size())
        self._driver.copy(self._stream(), out.data_ptr(), src, shape)
        self.counters.add(self._links[peer], region.num_bytes)
        return out

    def signal(self, buffer: SymmetricBuffer, flag_index: int, peer: int) -> None:
        assert isinstance(buffer, StreamBuffer)
        # The write follows everything earlier on the stream, copies included, and makes it visible
        # first.
        self._driver.write32(self._stream(), buffer.flag_address(flag_index, peer), 1)

    def wait(
        self,
        buffer: SymmetricBuffer,
        flag: Flag,
        peer: int,
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        """Enqueue the wait. ``on_wait`` is not called: the host does not wait."""
        assert isinstance(buffer, StreamBuffer)
        self._check_peer(peer)
        address, stream = buffer.flag_address(flag.index, self.rank), self._stream()
        lane = self.heartbeat.stream_lane_address(stream)
        if flag.index not in buffer.flag_names:
            buffer.flag_names[flag.index] = (flag, peer)
        self._driver.note32(stream, lane, buffer.wait_token(flag.index))
        self._driver.wait32(stream, address, 1)
        self._driver.write32(stream, address, 0)
        self._driver.note32(stream, lane, 0)

    def preset(self, buffer: SymmetricBuffer, flag_index: int) -> None:
        self._write_own(buffer, flag_index, 1)

    def clear(self, buffer: SymmetricBuffer, flag_index: int) -> None:
        self._write_own(buffer, flag_index, 0)

    def _write_own(self, buffer: SymmetricBuffer, flag_index: int, value: int) -> None:
        assert isinstance(buffer, StreamBuffer)
        address = buffer.flag_address(flag_index, self.rank)
        self._driver.write32(self._stream(), address, value)

    def name_flags(self, buffer: SymmetricBuffer, flags: Sequence[tuple[Flag, int]]) -> None:
        assert isinstance(buffer, StreamBuffer)
        buffer.flag_names = {flag.index: (flag, peer) for flag, peer in flags}

    def begin_layer(self, buffer: SymmetricBuffer, context: str, *, parity: int = 0) -> None:
        self.layer_context = context
        self._note(self.heartbeat.begin_notes())

    def end_layer(self, buffer: SymmetricBuffer) -> None:
        self._note(self.heartbeat.end_notes())

    def _note(self, notes: Sequence[tuple[int, int]]) -> None:
        for address, value in notes:
            self._driver.note32(self._stream(), address, value)

    def post(self, words: tuple[int, int]) -> None:
        """As in the base class, from the host at once: not ordered with any stream."""
        self._open_board().post(words, rank=self.rank)

    def peek(self, peer: int) -> tuple[int, int]:
        return self._open_board().peek(peer)

    def close(self) -> None:
        """Close every buffer; may be called twice. Waits for the device, not for peers."""
        if self._closed:
            return
        self._closed = True
        # The watchdog still watches meanwhile: the device may be waiting for a peer that is gone.
        torch.cuda.synchronize(self.device)
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []
        self.watchdog.close()
        for process in self._processes:
            process.close()
        self._board = None

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def _keep(self, src: Tensor) -> None:
        """Keep the allocator from handing out the memory before the stream has read it."""
        if src.is_cuda:
            src.record_stream(torch.cuda.current_stream(self.device))

    def _check_source(self, src: Tensor, region: Region) -> None:
        if tuple(src.shape) != region.shape or src.dtype != region.dtype:
            raise ValueError(
                f"src must have the region's shape and dtype, {region.shape} {region.dtype}, "
                f"got {tuple(src.shape)} {src.dtype}"
            )
        if src.device != self.device:
            raise ValueError(f"src must be on this rank's {self.device}, got {src.device}")

    def _check_peer(self, peer: int) -> None:
        if not 0 <= peer < self.size:
            raise ValueError(f"peer must be a rank in [0, {self.size}), got {peer}")

    def _open_board(self) -> Board | StoreBoard:
        board = self._board
        if board is None:
            self._check_open()
        assert board is not None
        return board

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the {self.transport} communicator of rank {self.rank} is closed")
