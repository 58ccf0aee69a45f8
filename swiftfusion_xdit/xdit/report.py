"""What a launch did, out of an unmodified xDiT: one JSON file per rank, written at exit.

With ``SWIFTFUSION_REPORT_DIR=DIR`` every rank writes ``DIR/rank{global_rank}.json``::

    {"rank": 0, "strategy": "torus", "mesh": {"torus": 2, "ulysses": 1, "ring": 2}, "machines": 2,
     "attention_calls": n, "bytes_same_machine": n, "bytes_across_machines": n, "unmetered": [],
     "events": [[stream, name, start_us, end_us], ...]}

Bytes are those that this rank sent for attention. ``events`` are those of one layer from the
middle of the run, on CLOCK_MONOTONIC; ``unmetered`` names traffic that could not be counted.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from swiftfusion_xdit.topology import Link
from swiftfusion_xdit.xdit import groups, meter
from swiftfusion_xdit.xdit.options import Options
from swiftfusion_xdit.xdit.patches import Patches

RecordedEvent = tuple[str, str, float, float]


class Report:
    """Collects over all groups that this process runs; ``write`` may be called again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rank = dist.get_rank()
        self.strategy = "usp"
        self.mesh: dict[str, int] = {}
        self.num_machines = 1
        self.num_calls = 0
        self.meters: list[meter.CollectiveMeter] = []
        self._torus_bytes: dict[int, dict[str, Any]] = {}
        self._torus: dict[int, Any] = {}
        self._events: dict[int, list[RecordedEvent]] = {}

    def begin_call(self) -> None:
        """Count a call; events of the calls 1, 2, 4, 8, ... are kept.

        How many calls come is not known before the end, and a call near the middle is wanted:
        one of these lies between a quarter and a half of any number.
        """
        self.num_calls += 1
        if self.num_calls & (self.num_calls - 1) == 0:
            self._events[self.num_calls] = []

    def event(self, stream: str, name: str, body: Callable[[], Any]) -> Any:
        """Run ``body`` as one event of the current call."""
        kept = self._events.get(self.num_calls)
        if kept is None:
            return body()
        start_us = time.monotonic_ns() / 1e3
        result = body()
        kept.append((stream, name, start_us, time.monotonic_ns() / 1e3))
        return result

    @contextmanager
    def torus_call(self, sequence_parallel: Any) -> Iterator[None]:
        """Around one call of a SequenceParallel."""
        self.begin_call()
        self._torus[id(sequence_parallel)] = sequence_parallel
        kept = self._events.get(self.num_calls)
        if kept is None:
            yield
            return
        with sequence_parallel.record() as events:
            yield
        kept += [(event.stream, event.name, event.start_us, event.end_us) for event in events]
        self.mesh = sequence_parallel.mesh.as_dict()

    def close_torus(self, sequence_parallel: Any) -> None:
        """Keep the counters of a SequenceParallel that is about to be closed."""
        if self._torus.pop(id(sequence_parallel), None) is not None:
            self._torus_bytes[len(self._torus_bytes)] = sequence_parallel.stats()

    def as_dict(self) -> dict[str, Any]:
        stats = [*self._torus_bytes.values(), *(sp.stats() for sp in self._torus.values())]
        num_bytes = {
            link: sum(one.num_bytes[link] for one in self.meters)
            + sum(one[link.value]["bytes"] for one in stats)
            for link in (Link.SAME_MACHINE, Link.ACROSS_MACHINES)
        }
        middle = max((i for i in self._events if 2 * i <= self.num_calls), default=1)
        return {
            "rank": self.rank,
            "strategy": self.strategy,
            "mesh": self.mesh,
            "machines": self.num_machines,
            "attention_calls": self.num_calls,
            "bytes_same_machine": num_bytes[Link.SAME_MACHINE],
            "bytes_across_machines": num_bytes[Link.ACROSS_MACHINES],
            "unmetered": sorted(set().union(*(one.unknown for one in self.meters))),
            "events": self._events.get(middle, []),
        }

    def write(self) -> None:
        """Write this rank's file, whole or not at all. What fails is said, not raised."""
        path = self.directory / f"rank{self.rank}.json"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            unfinished.write_text(json.dumps(self.as_dict()) + "\n", encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            print(f"swiftfusion_xdit: cannot write {path}: {error}", file=sys.stderr)


_report: Report | None = None


def start(directory: Path, group: Any, options: Options, patches: Patches) -> Report:
    """Report on this group's attention from now on. Collective over the group."""
    global _report
    if _report is None or _report.directory != directory:
        _report = Report(directory)
        atexit.register(_report.write)
    report = _report
    topology = groups.sp_topology(group, options)
    report.strategy = options.strategy
    report.num_machines = topology.num_machines
    report.mesh = groups.mesh_of(group).as_dict()
    counter = meter.CollectiveMeter(topology, group.ranks)
    report.meters.append(counter)
    meter.install(
        sys.modules["xfuser.model_executor.layers.usp"],
        counter,
        on_call=report.begin_call,
        on_event=report.event,
        patches=patches,
    )
    return report
