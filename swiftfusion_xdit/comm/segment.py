"""Shared-memory segments of the ranks of one host, mapped by all of them.

A segment lives in /dev/shm under a random name, readable and writable by its user alone, and has
that name only while the ranks map it: afterwards the mappings keep it alive, and it is gone when
the last process is, however that ended. Ranks tell each other fixed-size integers and nothing
else, so nothing that comes from a peer is unpickled.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.comm import semaphore

DIRECTORY = Path("/dev/shm")
PREFIX = "swiftfusion-"

_TOKEN_FORMAT = "=2q"  # the 16 random bytes of a name, as two int64


def exchange(group: dist.ProcessGroup, values: Sequence[int]) -> list[list[int]]:
    """Collective: every rank's int64 values, equally many from each, in rank order."""
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    mine = torch.tensor(list(values), dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    return [values.tolist() for values in gathered]


@dataclass(frozen=True)
class Layout:
    """Where things are in a segment: the flags, then, on a page of its own, the data."""

    num_bytes: int
    num_flags: int

    @property
    def data_offset(self) -> int:
        flag_bytes = self.num_flags * semaphore.SEMAPHORE_BYTES
        return -(-flag_bytes // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def segment_bytes(self) -> int:
        return max(self.data_offset + self.num_bytes, mmap.PAGESIZE)


def map_segments(group: dist.ProcessGroup, *, num_bytes: int, num_flags: int) -> list[Tensor]:
    """Collective: every rank's segment, uint8 ``[segment_bytes]``, in rank order.

    Data and flags are zero. No name is left when this returns or raises; if a rank is killed in
    the meantime, the others remove its name too.

    Raises:
        ValueError: ranks disagree about a size, or a size is negative.
        OSError: a rank had no room, or could not map the segment of another.
    """
    rank = dist.get_rank(group)
    # Every name is known to all before the first segment exists: survivors can always clean up.
    token = struct.unpack(_TOKEN_FORMAT, secrets.token_bytes(16))
    offers = exchange(group, [num_bytes, num_flags, *token])
    check_sizes(offers)
    layout = Layout(num_bytes, num_flags)
    paths = [_path(hi, lo) for _, _, hi, lo in offers]
    to_unlink = paths
    error: OSError | None = None
    try:
        try:
            _create(paths[rank], layout)
        except OSError as caught:
            error = caught
        _raise_first(group, error, layout, f"cannot create its segment in {DIRECTORY}")
        segments: list[Tensor] = []
        try:
            segments = [_attach(path, layout) for path in paths]
        except OSError as caught:
            error = caught
        _raise_first(group, error, layout, "cannot map the segments of the group")
        to_unlink = [paths[rank]]
    finally:
        for path in to_unlink:
            path.unlink(missing_ok=True)
    return segments


def _path(*token: int) -> Path:
    return DIRECTORY / (PREFIX + struct.pack(_TOKEN_FORMAT, *token).hex())


def check_sizes(offers: list[list[int]]) -> None:
    """Check that all ranks offer the same (num_bytes, num_flags, ...), none negative."""
    for name, column in (("num_bytes", 0), ("num_flags", 1)):
        values = [offer[column] for offer in offers]
        if len(set(values)) > 1:
            got = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ValueError(f"{name} must be the same on every rank, got {got}")
        if values[0] < 0:
            raise ValueError(f"{name} must be >= 0, got {values[0]}")


def _create(path: Path, layout: Layout) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        # Takes the pages now: a full file system is an error here and not a SIGBUS in a put.
        os.posix_fallocate(fd, 0, layout.segment_bytes)
        memory = _map(fd, layout)
    finally:
        os.close(fd)
    for idx in range(layout.num_flags):
        semaphore.init(memory.data_ptr() + idx * semaphore.SEMAPHORE_BYTES)


def _attach(path: Path, layout: Layout) -> Tensor:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        private = stat.S_ISREG(info.st_mode) and not info.st_mode & 0o077
        if info.st_uid != os.geteuid() or not private:
            raise PermissionError(errno.EPERM, "a segment must be a file of this user, mode 0600")
        if info.st_size != layout.segment_bytes:
            raise OSError(
                errno.EINVAL, f"a segment has {info.st_size} bytes, not {layout.segment_bytes}"
            )
        return _map(fd, layout)
    finally:
        os.close(fd)


def _map(fd: int, layout: Layout) -> Tensor:
    # The tensor owns the mapping. It is never closed by hand, because tensors that the user made
    # from it would then point nowhere; it ends with the last of them.
    mapping = mmap.mmap(fd, layout.segment_bytes)
    with torch.inference_mode(False):
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _raise_first(
    group: dist.ProcessGroup, error: OSError | None, layout: Layout, what: str
) -> None:
    """Collective: raise on every rank if any rank has an error, naming the first that has."""
    code = 0 if error is None else (error.errno or errno.EIO)
    for rank, (failed, available) in enumerate(exchange(group, [code, _available_bytes()])):
        if failed:
            raise OSError(
                failed,
                f"rank {rank} {what}: {os.strerror(failed)}; {layout.segment_bytes} bytes wanted "
                f"a rank, {available} bytes available",
            ) from error


def _available_bytes() -> int:
    try:
        info = os.statvfs(DIRECTORY)
    except OSError:
        return 0
    return info.f_bavail * info.f_frsize
