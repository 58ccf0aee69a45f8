"""The rank's side of `benchmarks.layer_trace`: runs warm layers under a profiler.

On GPUs CUPTI records every kernel and copy with its stream, through torch.profiler and nothing but
its CUDA activities. Kineto gives CUPTI's times as Unix time, and each process converts them for
itself: all ranks run on one host, so their clocks agree to about the error of that conversion. The
all-reduces around the layers, which end on all ranks at once, show what is left of it.

On CPU ranks torch.profiler records operators, and torus the steps of its runtime.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.trace_events import (
    STEP,
    Activity,
    NotSplit,
    Recording,
    read_profile,
    recording_of,
)
from swiftfusion_xdit.cli.bench_config import BenchConfig, Case, Shape
from swiftfusion_xdit.cli.bench_parts import Ranks
from swiftfusion_xdit.cli.bench_ranks import LayerBench
from swiftfusion_xdit.cli.bench_stock import StockUsp

WARM_LAYERS = 2  # of a recording, which are left out
MARKERS = 3  # all-reduces in front of a recording, and behind it
CYCLES_PER_US = 2000  # or less, so a GPU is held for no shorter than asked
HOLD = 3.0  # times what the host took to enqueue the layers unprofiled
MOST_HELD_US = 200_000.0


@dataclass(frozen=True, kw_only=True)
class TraceConfig(BenchConfig):
    """``BenchConfig`` with what is recorded: ``layers`` of each case, behind the warm ones.

    ``ahead``: also with the GPU held until the host has enqueued all layers.

    Raises:
        ValueError: naming the argument, its rule and the values.
    """

    layers: int
    ahead: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        # Even: slots of even and odd layers are left as they were found.
        if self.layers < 2 or self.layers % 2:
            raise ValueError(f"--layers must be even and at least 2, got {self.layers}")
        if self.ahead and self.device == "cpu":
            raise ValueError("--ahead needs --device cuda")
        if len(self.backends) != 1:
            raise ValueError(f"--backend must be one, got {','.join(self.backends)}")

    @property
    def bench_type(self) -> type[LayerBench]:
        return TraceBench

    def cases(self) -> list[Case]:
        """The kernel alone, xDiT's Ulysses over all ranks in both its forms, torus."""
        (backend,) = self.backends
        stock = [
            Case("usp", backend, ulysses=self.ranks, combined=combined)
            for combined in (False, True)
        ]
        return [Case("floor", backend), *stock, *self._torus(backend)]


class TraceBench(LayerBench):
    """Records layers instead of timing turns."""

    def __init__(
        self, config: BenchConfig, shape: Shape, ranks: Ranks, stock: StockUsp, resources: ExitStack
    ) -> None:
        super().__init__(config, shape, ranks, stock, resources)
        assert isinstance(config, TraceConfig)
        self.num_layers = WARM_LAYERS + config.layers
        self.ahead = config.ahead
        # Unix time is too large a number of nanoseconds for a float.
        self._origin_ns = ranks.gather(time.time_ns())[0]

    def run(self) -> dict[str, Any]:
        """Check all cases, then record them. Every rank returns the recordings of all."""
        for case in self.measured:
            self._check(case)
        self._profile(lambda: None)  # CUPTI is at work before a graph is captured
        found = []
        for case in self._wanted():
            for mode in self._modes(case):
                found.append(self._trace(case, mode))
        self._graphs.clear()
        return {"cases": found}

    def _wanted(self) -> list[Case]:
        """All cases, but of xDiT's forms only the faster one."""
        us: dict[Case, float] = {}
        for case in self._cases():
            if case.is_stock:
                run = self._eager(case)
                us[case] = min(max(self.ranks.gather(self._window(run)[0])) for _ in range(3))
        fastest = min(us, key=lambda case: us[case], default=None)
        return [case for case in self.measured if case not in us or case == fastest]

    def _modes(self, case: Case) -> list[str]:
        modes = ["eager"]
        if case in self._cases():
            modes += ["ahead"] if self.ahead else []
            modes += ["graph"] if self.config.graph and case.kind == "torus" else []
        return modes

    def _eager(self, case: Case) -> Callable[[], Any]:
        """What runs all layers of ``case``. Collective; stock is in place until the next call."""
        layer = self.layer(case)

        def run() -> None:
            for _ in range(self.num_layers):
                layer()

        return run

    def _trace(self, case: Case, mode: str) -> dict[str, Any]:
        found = self.measured[case]
        result: dict[str, Any] = {
            "kind": case.kind,
            "name": case.name,
            "backend": case.backend,
            "schedule": case.schedule or None,
            "mode": mode,
            "plan": found.plan,
            "relative_error": found.relative_error,
            "failure": found.failure,
        }
        if found.failure is not None:
            return result
        run = self._eager(case)
        if mode == "graph":
            found.layers = self.num_layers
            self._capture(case)
            if found.graph_failure is not None:
                return result | {"failure": f"graph: {found.graph_failure}"}
            run = self._graphs[case][0].replay
        held_us = self._held_us(run) if mode == "ahead" else 0.0
        self._window(run, held_us)
        untraced_us, was_ahead = self._window(run, held_us)
        recording, failure = None, None
        try:
            recording, recorded_ahead = self._record(case, run, held_us)
            was_ahead &= recorded_ahead
        except (NotSplit, ValueError) as error:  # no JSON is a ValueError
            failure = f"{type(error).__name__}: {error}"
        return result | {
            "untraced_us": max(self.ranks.gather(untraced_us)),
            "host_was_ahead": all(self.ranks.gather(was_ahead)),
            "failure": self.ranks.first_failure(failure),
            "recordings": self.ranks.gather(recording),
        }

    def _held_us(self, run: Callable[[], Any]) -> float:
        """How long to hold the GPUs for all layers to be enqueued, profiled or not."""
        self._synchronize()
        self.ranks.barrier()
        begin_s = time.perf_counter()
        run()
        host_us = max(self.ranks.gather((time.perf_counter() - begin_s) * 1e6))
        self._synchronize()
        return min(HOLD * host_us, MOST_HELD_US)

    def _window(self, run: Callable[[], Any], held_us: float = 0.0) -> tuple[float, bool]:
        """All layers between all-reduces: microseconds of one; whether none began while enqueued.

        Collective.
        """
        self._synchronize()
        self.ranks.barrier()
        if held_us:
            torch.cuda._sleep(int(held_us * CYCLES_PER_US))
        self._mark()
        if not self.on_gpu:
            begin_s = time.perf_counter()
            run()
            us = (time.perf_counter() - begin_s) * 1e6
            self._mark()
            return us / self.num_layers, False
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        self._mark()
        was_ahead = not start.query()
        self._synchronize()
        return start.elapsed_time(end) * 1e3 / self.num_layers, was_ahead

    def _mark(self) -> None:
        for _ in range(MARKERS):
            dist.all_reduce(self._token)

    def _record(self, case: Case, run: Callable[[], Any], held_us: float) -> tuple[Recording, bool]:
        """All layers, and whether the host was ahead meanwhile. Collective."""
        if not self.on_gpu and case.kind == "torus":
            return self._record_steps(case, run), False
        was_ahead = []

        def twice() -> None:
            for _ in range(2):  # the profiler's first records cost the most
                was_ahead.append(self._window(run, held_us)[1])

        recorded = self._profile(twice)
        return recording_of(recorded, MARKERS, pushes=case.kind == "torus"), was_ahead[-1]

    def _profile(self, body: Callable[[], None]) -> list[Activity]:
        """What runs in ``body``. Collective."""
        activity = ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU
        self._synchronize()
        self.ranks.barrier()
        with profile(activities=[activity]) as profiler:
            body()
            self._synchronize()
            self.ranks.barrier()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            text = path.read_text(encoding="utf-8", errors="replace")
        return read_profile(json.loads(text, strict=False), origin_ns=self._origin_ns)

    def _record_steps(self, case: Case, run: Callable[[], Any]) -> Recording:
        """The runtime's own events, on the clock that all processes of a host share."""
        self.ranks.barrier()
        begin_us = time.monotonic_ns() / 1e3
        with self._torus[case].record() as events:
            run()
        activities = tuple(
            Activity(event.name, STEP, event.stream, event.start_us, event.end_us)
            for event in events
        )
        # No all-reduces, whose ends would be moved onto each other: the clock is one already.
        common_us = max(self.ranks.gather(begin_us))
        return Recording(activities, (common_us,), (), pushes=True)
