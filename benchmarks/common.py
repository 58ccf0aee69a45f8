"""What every benchmark records beside its numbers, and how it sums samples up."""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import psutil

from swiftfusion_xdit.cli import machine


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; one sample is all three."""
    if len(samples) == 1:
        return (samples[0],) * 3
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def provenance(
    name: str, doc: str | None, arguments: Sequence[str] | None = None
) -> dict[str, Any]:
    """What a file of results begins with.

    Args:
        name: of the benchmark, a module here.
        doc: the module's, whose first line is the question.
        arguments: of the command; by default those of this process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    return {
        "benchmark": name,
        "question": (doc or "").splitlines()[0],
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *words]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def environment() -> dict[str, Any]:
    """The hardware and the versions of a run, as this process sees them: it opens the GPUs."""
    return {"hardware": machine.hardware(), "versions": machine.versions()}


class HostLoad:
    """How busy this host is with other things, from when this is made."""

    def __init__(self) -> None:
        self._start = psutil.cpu_times()

    def others(self, own_cpu_s: float) -> dict[str, float]:
        """Cores that other processes used on average, and that the hypervisor took away.

        Args:
            own_cpu_s: CPU seconds of the measured processes since this was made.
        """
        end = psutil.cpu_times()
        spent = {name: getattr(end, name) - getattr(self._start, name) for name in end._fields}
        idle_s = spent["idle"] + spent["iowait"]
        # Guest time is part of user time.
        total_s = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)
        seconds = total_s / (os.cpu_count() or 1)
        busy_s = total_s - idle_s - spent["steal"]
        return {
            "other_cores": round(max(0.0, busy_s - own_cpu_s) / seconds, 2),
            "stolen_cores": round(spent["steal"] / seconds, 2),
        }
