"""The ``shm`` transport: ranks of one host, one-sided through shared memory.

Every rank maps every rank's segment. A put is one strided copy into the peer's mapping, done when
it returns; no rank works for another. A flag is a semaphore in the segment of the rank that waits
for it: setting it is a release and taking it an acquire (semaphore.py), so the data that was put
before the flag was set is there for whoever has taken it. A copy that PyTorch spread over several
threads has joined them before it returns, so its parts are covered too.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.comm import process, segment, semaphore
from swiftfusion_xdit.comm.base import Communicator, Flag, PeerTimeout, Region, SymmetricBuffer
from swiftfusion_xdit.comm.board import Board
from swiftfusion_xdit.topology import Topology

# How a wait goes on: a few looks that give the core away in between, for a peer that is about to
# signal; then sleeps in the kernel, which end as soon as the flag is set. Their length only says
# how soon a peer that died is noticed and on_wait called.
NUM_YIELDS = 20
FIRST_SLEEP_S = 1e-3
LAST_SLEEP_S = 50e-3

_MAX_VIEWS = 4096


class ShmBuffer(SymmetricBuffer):
    """This rank's view of one symmetric buffer: data and flags of all ranks, mapped here."""

    def __init__(
        self, segments: list[Tensor], *, rank: int, num_bytes: int, num_flags: int
    ) -> None:
        self.num_bytes = num_bytes
        self.num_flags = num_flags
        self._rank = rank
        self._size = len(segments)
        self._segments = segments
        self._addresses = [memory.data_ptr() for memory in segments]
        self._views: dict[tuple[Region, int], Tensor] = {}

    @property
    def local(self) -> Tensor:
        return self.memory(self._rank)

    def view(self, region: Region, peer: int) -> Tensor:
        """``region`` of the peer's memory; kept, since a schedule asks for the same ones again."""
        key = (region, peer)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            # Made in inference mode it could not be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                view = self._views[key] = region.view(self.memory(peer))
        return view

    def flag_address(self, index: int, peer: int) -> int:
        """Where the semaphore of a flag of ``peer`` is mapped here."""
        self._check(peer)
        if not 0 <= index < self.num_flags:
            raise ValueError(f"flag index must be in [0, {self.num_flags}), got {index}")
        return self._addresses[peer] + index * semaphore.SEMAPHORE_BYTES

    def memory(self, peer: int) -> Tensor:
        """The data of ``peer``: uint8 ``[num_bytes]``."""
        self._check(peer)
        offset = segment.Layout(self.num_bytes, self.num_flags).data_offset
        return self._segments[peer][offset : offset + self.num_bytes]

    def close(self) -> None:
        self._segments = []
        self._views = {}

    def _check(self, peer: int) -> None:
        if not self._segments:
            raise RuntimeError(f"the symmetric buffer of {self.num_bytes} bytes is closed")
        if not 0 <= peer < self._size:
            raise ValueError(f"peer must be a rank in [0, {self._size}), got {peer}")


class ShmCommunicator(Communicator):
    """Ranks of ``group`` on one host; collective to build, ranks are those of the group.

    ``timeout_s`` bounds every wait; a peer whose process ends is reported at once. One thread
    waits for a given flag; otherwise threads may share a communicator.

    Raises:
        ValueError: the ranks are on several hosts, ``topology`` does not place every rank, or
            ``timeout_s`` is not positive.
    """

    def __init__(self, group: dist.ProcessGroup, topology: Topology, *, timeout_s: float) -> None:
        super().__init__(
            rank=dist.get_rank(group), size=dist.get_world_size(group), topology=topology
        )
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self._group = group
        self._timeout_s = timeout_s
        self._links = [topology.link(self.rank, peer) for peer in range(self.size)]
        self._buffers: list[ShmBuffer] = []
        self._closed = False
        self._board: Board | None = None
        self._processes = meet(group)
        try:
            buffer = self.allocate(Board.NUM_BYTES, num_flags=0)
            self._board = Board([buffer.memory(peer) for peer in range(self.size)])
        except BaseException:
            self.close()
            raise

    def allocate(self, num_bytes: int, *, num_flags: int) -> ShmBuffer:
        self._check_open()
        segments = segment.map_segments(self._group, num_bytes=num_bytes, num_flags=num_flags)
        buffer = ShmBuffer(segments, rank=self.rank, num_bytes=num_bytes, num_flags=num_flags)
        self._buffers.append(buffer)
        return buffer

    def free(self, buffer: SymmetricBuffer) -> None:
        self._check_open()
        if buffer not in self._buffers:
            raise ValueError(f"the buffer must be one of this communicator's, got {buffer}")
        # No rank has to wait for another: a peer's mapping outlives ours.
        buffer.close()
        self._buffers = [other for other in self._buffers if other is not buffer]

    def put(self, src: Tensor, buffer: SymmetricBuffer, region: Region, peer: int) -> None:
        assert isinstance(buffer, ShmBuffer)
        dst = buffer.view(region, peer)
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError(
                f"src must have the region's shape and dtype, {region.shape} {region.dtype}, "
                f"got {tuple(src.shape)} {src.dtype}"
            )
        dst.copy_(src.detach() if src.requires_grad else src)
        self.counters.add(self._links[peer], region.num_bytes)

    def get(self, buffer: SymmetricBuffer, region: Region, peer: int) -> Tensor:
        assert isinstance(buffer, ShmBuffer)
        src = buffer.view(region, peer)
        self.counters.add(self._links[peer], region.num_bytes)
        return src.clone(memory_format=torch.contiguous_format)

    def signal(self, buffer: SymmetricBuffer, flag_index: int, peer: int) -> None:
        assert isinstance(buffer, ShmBuffer)
        address = buffer.flag_address(flag_index, peer)
        # This rank alone signals the flag, so if it is set here its owner has not waited for it.
        assert not semaphore.is_set(address), (
            f"rank {self.rank} signals flag {flag_index} of rank {peer}, which is still set "
            f"({self.context})"
        )
        semaphore.set_(address)

    def preset(self, buffer: SymmetricBuffer, flag_index: int) -> None:
        self.signal(buffer, flag_index, self.rank)

    def clear(self, buffer: SymmetricBuffer, flag_index: int) -> None:
        assert isinstance(buffer, ShmBuffer)
        semaphore.try_take(buffer.flag_address(flag_index, self.rank))

    def wait(
        self,
        buffer: SymmetricBuffer,
        flag: Flag,
        peer: int,
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        assert isinstance(buffer, ShmBuffer)
        address = buffer.flag_address(flag.index, self.rank)
        if not 0 <= peer < self.size:
            raise ValueError(f"peer must be a rank in [0, {self.size}), got {peer}")
        if not semaphore.try_take(address):
            mapped = buffer.memory(self.rank)  # stays, should another thread close the buffer
            self._sleep_until_set(address, flag, peer, on_wait)
            del mapped

    def _sleep_until_set(
        self, address: int, flag: Flag, peer: int, on_wait: Callable[[], None] | None
    ) -> None:
        start = time.monotonic()
        for _ in range(NUM_YIELDS):
            os.sched_yield()
            if semaphore.try_take(address):
                return
        sleep_s = FIRST_SLEEP_S
        while True:
            if on_wait is not None:
                on_wait()
            waited_s = time.monotonic() - start
            # Looked at before the flag: what the peer signalled before it ended still counts.
            exited = self._processes[peer].exited()
            give_up = exited or waited_s >= self._timeout_s
            limit_s = 0.0 if give_up else min(sleep_s, self._timeout_s - waited_s)
            if semaphore.take(address, limit_s):
                return
            if give_up:
                raise PeerTimeout(self._report(flag, peer, waited_s))
            sleep_s = min(2 * sleep_s, LAST_SLEEP_S)

    def _report(self, flag: Flag, peer: int, waited_s: float) -> str:
        doing = f" in {self.context}" if self.context else ""
        return (
            f"rank {self.rank} of {self.size}{doing}: waited {waited_s:.1f} s of at most "
            f"{self._timeout_s:g} s for {flag.name} (flag {flag.index}) from rank {peer}: "
            f"expected 1, seen 0; rank {peer}'s {self._processes[peer].describe()}"
        )

    def post(self, words: tuple[int, int]) -> None:
        self._open_board().post(words, rank=self.rank)

    def peek(self, peer: int) -> tuple[int, int]:
        return self._open_board().peek(peer)

    def close(self) -> None:
        self._closed = True
        for buffer in self._buffers:
            buffer.close()
        for peer in self._processes:
            peer.close()
        self._buffers = []
        self._board = None

    def _open_board(self) -> Board:
        # One read: the thread that goes on with it keeps it mapped if another one closes.
        board = self._board
        if board is None:
            self._check_open()
        assert board is not None
        return board

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the shm communicator of rank {self.rank} is closed")


def meet(group: dist.ProcessGroup, *, transport: str = "shm") -> list[process.PeerProcess]:
    """Collective: check that the ranks share one host, and watch their processes.

    Raises:
        ValueError: on every rank, naming ``transport`` and the host of each.
    """
    host = host_words()
    hostname = struct.unpack("=8q", socket.gethostname().encode()[:64].ljust(64, b"\0"))
    pid = os.getpid()
    mine = (*host, process.pid_namespace(), pid, process.start_time(pid), *hostname)
    ranks = segment.exchange(group, mine)
    if len({tuple(values[:3]) for values in ranks}) > 1:
        names = ", ".join(f"rank {rank}: {_host_name(v)}" for rank, v in enumerate(ranks))
        raise ValueError(
            f"transport {transport} needs every rank on one host with one {segment.DIRECTORY}, "
            f"got {names}"
        )
    return [
        process.PeerProcess(peer_pid if namespace == mine[3] else None, started=started)
        for _, _, _, namespace, peer_pid, started, *_ in ranks
    ]


def host_words() -> tuple[int, ...]:
    """Three int64 that are equal where ranks share a running host and its shared memory."""
    try:
        # Containers of one host share memory only if they share this mount.
        device = segment.DIRECTORY.stat().st_dev
    except OSError:
        device = -1
    return (*struct.unpack("=2q", _boot_id()), device)


def _boot_id() -> bytes:
    """16 random bytes that the kernel drew when it started: one running host, whatever its name."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))


def _host_name(values: list[int]) -> str:
    """``host (boot 1a2b3c4d, /dev/shm 25)``; equal names may still be different hosts."""
    name = struct.pack("=8q", *values[6:]).rstrip(b"\0").decode(errors="replace")
    boot = struct.pack("=q", values[0]).hex()[:8]
    return f"{name!r} (boot {boot}, {segment.DIRECTORY} {values[2]})"
