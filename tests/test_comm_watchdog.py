"""The watchdog reports a layer that stands still or waits for the dead, and no other."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from swiftfusion_xdit.comm.watchdog import (
    BLIND_GRACE_S,
    DEATH_GRACE_S,
    EXIT_STATUS,
    MAX_WAITS_SHOWN,
    PendingWait,
    Watchdog,
)

TIMEOUT_S = 60.0
FULL = PendingWait("FULL of k[chunk 1, heads 0]", 3, 1, 0)


class Device:
    """A device whose notes the test writes."""

    def __init__(self) -> None:
        self.beat = False
        self.busy = False
        self.waits: list[PendingWait] = []
        self.num_reads = 0

    def begin(self) -> None:
        self.beat = self.busy = True

    def end(self) -> None:
        self.beat, self.busy = True, False

    def take_beat(self) -> bool:
        beat, self.beat = self.beat, False
        return beat

    def in_flight(self) -> bool:
        return self.busy

    def pending(self) -> list[PendingWait]:
        self.num_reads += 1
        return list(self.waits)


class Process:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.dead = False

    def exited(self) -> bool:
        return self.dead

    def describe(self) -> str:
        return f"process {self.pid} " + ("has exited" if self.dead else "is alive")


def watch(device: Device, processes: list[Process]) -> Watchdog:
    return Watchdog(
        device, processes, rank=0, timeout_s=TIMEOUT_S, context=lambda: "attention call 12"
    )


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def processes() -> list[Process]:
    return [Process(40), Process(41), Process(42)]


def test_a_layer_without_progress_is_reported(device: Device, processes: list[Process]) -> None:
    watchdog = watch(device, processes)
    device.begin()
    device.waits = [FULL]
    assert watchdog.check(100.0) is None
    assert watchdog.check(100.0 + TIMEOUT_S - 1) is None
    assert device.num_reads == 0, "flags are read only when there is something to report"
    assert watchdog.check(100.0 + TIMEOUT_S) == (
        "rank 0 of 3 in attention call 12: no progress for 60.0 s of at most 60 s; waits for FULL "
        "of k[chunk 1, heads 0] (flag 3) from rank 1: expected 1, seen 0; rank 1's process 41 is "
        "alive"
    )


def test_layer_after_layer_is_progress(device: Device, processes: list[Process]) -> None:
    watchdog = watch(device, processes)
    for second in range(1000):
        device.begin()  # the end of the layer before falls between two looks
        assert watchdog.check(float(second)) is None


def test_an_idle_device_is_not_late(device: Device, processes: list[Process]) -> None:
    watchdog = watch(device, processes)
    device.begin()
    watchdog.check(0.0)
    device.end()
    processes[1].dead = True
    for now in (1.0, 2.0, 10 * TIMEOUT_S, 20 * TIMEOUT_S):
        assert watchdog.check(now) is None
    device.begin()
    assert watchdog.check(20 * TIMEOUT_S + 1) is None, "counted from the layer's begin"


def test_a_dead_peer_is_reported_long_before_the_deadline(
    device: Device, processes: list[Process]
) -> None:
    watchdog = watch(device, processes)
    device.begin()
    device.waits = [FULL, PendingWait("FULL of v[chunk 2, heads 0]", 4, 2, 0)]
    watchdog.check(0.0)
    processes[1].dead = True
    assert watchdog.check(DEATH_GRACE_S + 0.1) is None, "its signal may be on its way"
    report = watchdog.check(DEATH_GRACE_S + 0.2)
    assert report is not None
    assert "rank 1's process 41 has exited" in report
    assert "rank 2's process 42 is alive" in report


def test_a_peer_that_ends_after_its_last_put_is_no_failure(
    device: Device, processes: list[Process]
) -> None:
    watchdog = watch(device, processes)
    device.begin()
    device.waits = [FULL]
    watchdog.check(0.0)
    processes[1].dead = True
    assert watchdog.check(DEATH_GRACE_S + 0.1) is None
    device.waits = []  # the signal came
    for tenth in range(100):
        assert watchdog.check(1.0 + tenth / 10) is None
    processes[2].dead = True
    assert watchdog.check(20.0) is None, "a long kernel that waits for nobody"


def test_waits_for_the_living_outlast_the_death_of_another(
    device: Device, processes: list[Process]
) -> None:
    watchdog = watch(device, processes)
    device.begin()
    device.waits = [FULL]
    processes[2].dead = True
    for tenth in range(500):
        assert watchdog.check(tenth / 10) is None
    report = watchdog.check(TIMEOUT_S + 1)
    assert report is not None
    assert report.splitlines()[-1].endswith("; rank 2's process 42 has exited")


def test_a_device_that_notes_no_waits_is_given_longer(
    device: Device, processes: list[Process]
) -> None:
    watchdog = watch(device, processes)
    device.begin()
    device.waits = [PendingWait("FULL of q", i, 1, 0, certain=False) for i in range(40)]
    watchdog.check(0.0)
    processes[1].dead = True
    assert watchdog.check(BLIND_GRACE_S - 0.1) is None
    report = watchdog.check(BLIND_GRACE_S)
    assert report is not None
    assert report.count("may wait for FULL of q") == MAX_WAITS_SHOWN
    assert f"{40 - MAX_WAITS_SHOWN} more flags not set" in report


def test_the_thread_reports_once_and_ends(processes: list[Process]) -> None:
    device, reports, called = Device(), list[str](), threading.Event()

    def on_failure(report: str) -> None:
        reports.append(report)
        called.set()

    watchdog = Watchdog(
        device,
        processes,
        rank=0,
        timeout_s=0.05,
        context=lambda: "",
        on_failure=on_failure,
        interval_s=0.01,
    )
    device.begin()
    watchdog.start()
    assert called.wait(60)
    watchdog.close()
    watchdog.close()
    assert len(reports) == 1
    assert "no wait of this rank is known" in reports[0]


def test_the_process_ends_with_a_status_of_its_own() -> None:
    program = (
        "import sys, threading, time\n"
        "from swiftfusion_xdit.comm.watchdog import end_process\n"
        "threading.Thread(target=end_process, args=('rank 0 waits',)).start()\n"
        "time.sleep(600)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == EXIT_STATUS
    assert ended.stderr.endswith("rank 0 waits\n")
