"""What every benchmark records beside its numbers, and how it sums samples up."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; one sample is all three."""
    if len(samples) == 1:
        return (samples[0],) * 3
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def environment(module: str) -> dict[str, Any]:
    """The command, the date, the hardware and the versions of a run of ``module``."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu_model(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "versions": {
            "python": platform.python_version(),
            "linux": platform.release(),
            **{name: version(name) for name in ("torch", "xfuser", "swiftfusion-xdit")},
        },
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


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


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
