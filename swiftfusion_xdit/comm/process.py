"""Whether the process of a peer on this host still runs."""

from __future__ import annotations

import os
import select
from pathlib import Path

_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "in uninterruptible sleep"}


def pid_namespace() -> int:
    """Identity of this process's PID namespace: pids mean the same only inside one."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 if it does not run.

    With the pid it names a process for good: the kernel reuses pids.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in ("Z", "X") else 0


class PeerProcess:
    """Watches one process, named by pid and start time.

    A pidfd reports the end of a process at once, also while its parent has not collected it.
    Where the kernel has none, /proc tells the same. ``pid`` None means a process that cannot be
    seen from here (another PID namespace): it never counts as exited.
    """

    def __init__(self, pid: int | None, *, started: int) -> None:
        self._pid = pid
        self._started = started
        self._fd: int | None = None
        if pid is None:
            return
        try:
            self._fd = os.pidfd_open(pid)
        except (AttributeError, OSError):  # old kernel, Python built for one, sandbox, or gone
            return
        if start_time(pid) != started:  # ended, and its pid may be another process's by now
            self.close()

    def exited(self) -> bool:
        """Whether the process has ended, also by a signal."""
        if self._fd is not None:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return bool(poll.poll(0))
        return self._pid is not None and start_time(self._pid) != self._started

    def describe(self) -> str:
        """A clause for a report, such as ``process 4242 is alive (stopped)``."""
        if self._pid is None:
            return "its process cannot be seen from this PID namespace"
        if self.exited():
            return f"process {self._pid} has exited"
        fields = _stat(self._pid)
        state = _STATES.get(fields[0], "") if fields else ""
        return f"process {self._pid} is alive" + (f" ({state})" if state else "")

    def close(self) -> None:
        """Give the descriptor back; may be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third, the state, on; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    # The second field is the command in parentheses and may itself contain spaces and ")".
    return text.rpartition(")")[2].split()
