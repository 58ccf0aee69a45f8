"""Ends a process whose device work waits for a peer that does not come.

Work on a stream cannot time out: a wait that is enqueued waits for ever, and the host may sit in
a synchronisation meanwhile. So a thread of each rank looks at what its device notes on the way
(``Probe``), and when a layer makes no progress, or a peer that is waited for has died, it reports
who waits for what and ends the process with a status of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

EXIT_STATUS = 13
INTERVAL_S = 0.1
DEATH_GRACE_S = 0.3  # a peer that ends right after its last put is no failure
BLIND_GRACE_S = 5.0  # the same where the device does not note what it waits for
MAX_WAITS_SHOWN = 16


@dataclass(frozen=True)
class PendingWait:
    """A flag that the device waits for, or may be waiting for if ``certain`` is False."""

    name: str
    index: int
    peer: int
    seen: int | None  # None: the flag could not be read
    certain: bool = True

    def describe(self) -> str:
        verb = "waits for" if self.certain else "may wait for"
        seen = "not readable" if self.seen is None else str(self.seen)
        return (
            f"{verb} {self.name} (flag {self.index}) from rank {self.peer}: expected 1, seen {seen}"
        )


class Probe(Protocol):
    """What the device notes about its layers."""

    def take_beat(self) -> bool:
        """Whether a layer began or ended since this was last asked."""

    def in_flight(self) -> bool:
        """Whether the device is inside a layer."""

    def pending(self) -> list[PendingWait]:
        """The waits that hold the device up now."""


class Process(Protocol):
    """A peer's process."""

    def exited(self) -> bool: ...

    def describe(self) -> str: ...


def end_process(report: str) -> None:
    """Print the report on standard error and end this process at once, with ``EXIT_STATUS``."""
    # Straight to the descriptor: another thread may hold the lock of sys.stderr for good.
    data = (report.rstrip("\n") + "\n").encode()
    while data:
        try:
            data = data[os.write(2, data) :]
        except OSError:
            break
    os._exit(EXIT_STATUS)


class Watchdog:
    """Watches one communicator from a thread of its own. Owns the thread; ``close`` ends it.

    Args:
        probe: what the device notes.
        processes: the process of every rank of the group, in rank order.
        rank: this rank.
        timeout_s: how long a layer may make no progress.
        context: says what the device is doing, for the report.
        on_failure: gets the report, once.
    """

    def __init__(
        self,
        probe: Probe,
        processes: Sequence[Process],
        *,
        rank: int,
        timeout_s: float,
        context: Callable[[], str],
        on_failure: Callable[[str], None] = end_process,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._probe = probe
        self._processes = processes
        self._rank = rank
        self._timeout_s = timeout_s
        self._context = context
        self._on_failure = on_failure
        self._interval_s = min(interval_s, timeout_s / 4)
        self._since: float | None = None  # when the layer in flight was last seen to progress
        self._doomed: list[PendingWait] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="swiftfusion-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; may be called twice, also from the thread itself."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            report = self.check(time.monotonic())
            if report is not None and not self._stop.is_set():
                self._on_failure(report)
                return

    def check(self, now: float) -> str | None:
        """One look: the report if the device is held up for good, else None."""
        if self._probe.take_beat() or not self._probe.in_flight() or self._since is None:
            self._since, self._doomed = now, []
            return None
        stuck_s = now - self._since
        if stuck_s >= self._timeout_s:
            return self._report(stuck_s, self._probe.pending())
        if stuck_s < DEATH_GRACE_S:
            return None
        dead = [peer for peer, process in enumerate(self._processes) if process.exited()]
        if dead:
            return self._check_dead(stuck_s, dead)
        return None

    def _check_dead(self, stuck_s: float, dead: list[int]) -> str | None:
        pending = self._probe.pending()
        doomed = [wait for wait in pending if wait.peer in dead and wait.certain]
        # Seen twice: the peer's last signal may have been on its way at the first look.
        if doomed and doomed == self._doomed:
            return self._report(stuck_s, pending)
        self._doomed = doomed
        # Without pending waits the layer runs on, and needs nothing of the dead any more. With
        # waits for the living only, those find out and end, and are then the dead.
        blind = bool(pending) and not any(wait.certain for wait in pending)
        if blind and stuck_s >= BLIND_GRACE_S:
            return self._report(stuck_s, pending)
        return None

    def _report(self, stuck_s: float, pending: list[PendingWait]) -> str:
        size = len(self._processes)
        context = self._context()
        doing = f" in {context}" if context else ""
        head = (
            f"rank {self._rank} of {size}{doing}: no progress for {stuck_s:.1f} s of at most "
            f"{self._timeout_s:g} s"
        )
        lines = [f"{head}; {self._describe(wait)}" for wait in pending[:MAX_WAITS_SHOWN]]
        if len(pending) > MAX_WAITS_SHOWN:
            lines.append(f"{head}; {len(pending) - MAX_WAITS_SHOWN} more flags not set")
        if not lines:
            lines.append(f"{head}; no wait of this rank is known")
        named = {wait.peer for wait in pending[:MAX_WAITS_SHOWN]}
        for peer, process in enumerate(self._processes):
            if peer not in named and peer != self._rank and process.exited():
                lines.append(f"{head}; rank {peer}'s {process.describe()}")
        return "\n".join(lines)

    def _describe(self, wait: PendingWait) -> str:
        return f"{wait.describe()}; rank {wait.peer}'s {self._processes[wait.peer].describe()}"
