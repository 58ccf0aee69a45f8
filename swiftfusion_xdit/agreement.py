"""What the ranks of a group tell each other, rarely: options, hosts, and the sizes of a shape."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class Agreement:
    """Small collectives over a process group, of int64 numbers only, each with a deadline."""

    def __init__(self, group: dist.ProcessGroup, *, timeout_s: float) -> None:
        self._group = group
        self._timeout = timedelta(seconds=timeout_s)
        nccl = "nccl" in dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"

    def gather(self, what: str, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        """Every rank's numbers, in rank order; ``what`` names them in an error.

        Raises:
            RuntimeError: a rank is gone or does not answer before the deadline.
        """
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self._group.size())]
        try:
            work = dist.all_gather(everyone, mine, group=self._group, async_op=True)
            work.wait(self._timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self._group.rank()}: agreeing on {what}: no answer from every rank "
                f"within {self._timeout.total_seconds():g} s: {error}"
            ) from error
        return [tuple(numbers.tolist()) for numbers in everyone]

    def barrier(self, what: str) -> None:
        self.gather(what, (0,))

    def hosts(self) -> list[tuple[int, ...]]:
        """One identity of the host of each rank: equal where ranks share a kernel."""
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        boot = boot_id.read_text() if boot_id.exists() else ""
        return self.gather("host identities", (_digest(socket.gethostname() + boot),))

    def require_equal(self, what: str, text: str) -> None:
        """Check that every rank passes the same text.

        Raises:
            ValueError: naming the ranks that differ from rank 0, and this rank's text.
        """
        digests = self.gather(what, (_digest(text),))
        if differing := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise ValueError(
                f"{what} must be the same on every rank: ranks {differing} differ from rank 0; "
                f"rank {self._group.rank()} has {text!r}"
            )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
