"""The rank's side of `swiftfusion bench layer`: checks every case, then times all in turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.attention import attend, select_backend
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from swiftfusion_xdit.cli import machine
from swiftfusion_xdit.cli.bench_config import MAX_ERROR, BenchConfig, Case, Shape
from swiftfusion_xdit.cli.bench_parts import SEED, Measured, NoAttention, Orders, Ranks, joined
from swiftfusion_xdit.cli.bench_stock import NotRunnable, StockUsp
from swiftfusion_xdit.sequence_parallel import SequenceParallel

CHECKED_ROWS = 32  # query rows of a rank that are compared with the reference
TURN_MS = 15.0  # a turn runs as many layers as take about this long
MAX_TURN_LAYERS = 20
HOST_LAYERS = 4  # layers of an eager turn whose enqueueing is timed: queues are not full yet
MIN_ROUNDS, MAX_ROUNDS = 3, 25
HEAD_START_CYCLES = 2_500_000  # more than a millisecond

Layer = Callable[[], Tensor]


class LayerBench:
    """This rank's part of the benchmark of one shape. Owns inputs, groups' memory and graphs."""

    def __init__(
        self, config: BenchConfig, shape: Shape, ranks: Ranks, stock: StockUsp, resources: ExitStack
    ) -> None:
        self.config = config
        self.shape = shape
        self.ranks = ranks
        self.stock = stock
        self.on_gpu = config.device == "cuda"
        self.device = torch.device("cpu")
        if self.on_gpu:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._resources = resources
        self._torus: dict[Case, SequenceParallel] = {}
        self._graphs: dict[Case, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.measured = {case: Measured() for case in config.cases()}
        self._token = torch.zeros(1, device=self.device)
        self._make_inputs()

    def _make_inputs(self) -> None:
        shape, rank, size = self.shape, self.ranks.rank, self.ranks.size
        generator = torch.Generator(self.device).manual_seed(SEED)
        dims = (shape.batch, shape.rows, shape.heads, shape.head_dim)
        dtype = getattr(torch, self.config.dtype)
        whole = [
            torch.randn(dims, generator=generator, device=self.device, dtype=dtype)
            for _ in range(3)
        ]
        for x in whole:
            dist.broadcast(x, src=0)  # GPUs of different kinds draw different numbers
        self.rows = [x.tensor_split(size, dim=1)[rank].contiguous() for x in whole]
        self.heads = [x.tensor_split(size, dim=2)[rank].contiguous() for x in whole]
        self._checked_rows = _spread(self.rows[0].shape[1])
        self._checked_whole = _spread(shape.rows)
        query = self.rows[0][:, self._checked_rows]
        self._expected_rows = reference_attention(query, *whole[1:])
        query = self.heads[0][:, self._checked_whole]
        self._expected_heads = reference_attention(query, *self.heads[1:])

    def layer(self, case: Case) -> Layer:
        """Make ``case`` ready; the function that runs one layer of it. Collective."""
        if case.is_stock:
            q, k, v = self.rows
            return self.stock.layer(case, self.shape, q, k, v)
        if case.kind == "floor":
            return self._floor(case)
        sp = self._sequence_parallel(case)
        q, k, v = self.rows
        return lambda: sp.attention(q, k, v)

    def _floor(self, case: Case) -> Layer:
        backend = select_backend(case.backend, self.device)
        scale = 1 / math.sqrt(self.shape.head_dim)
        q, k, v = self.heads
        return lambda: attend(q, k, v, scale=scale, backend=backend)[0]

    def _sequence_parallel(self, case: Case) -> SequenceParallel:
        if case not in self._torus:
            sp = SequenceParallel(
                machines=self.config.machines,
                mesh=case.mesh,
                schedule=case.schedule,
                groups=case.groups,
                transport=case.transport or self.config.transports[0],
                backend=case.backend,
                layer_graphs=case.layer_graphs,
                device=self.device,
            )
            if case.kind == "comm":
                sp.backend = NoAttention(sp.backend)
            self._torus[case] = self._resources.enter_context(sp)
        return self._torus[case]

    def run(self) -> dict[str, Any]:
        """Check, time in turn, and gather. Every rank returns the results of all."""
        for case in self.measured:
            self._check(case)
        num_rounds = self._plan_turns()
        orders, turns = Orders(), self._turns()
        for _ in range(num_rounds):
            for case, is_graph in orders.draw(turns):
                self._turn(case, is_graph)
        everyone = self.ranks.gather([vars(found) for found in self.measured.values()])
        self._graphs.clear()
        return {
            "rounds": num_rounds,
            "cases": [
                joined(case, [rank[idx] for rank in everyone])
                for idx, case in enumerate(self.measured)
            ],
        }

    def _cases(self) -> list[Case]:
        return [case for case, found in self.measured.items() if found.failure is None]

    def _turns(self) -> list[tuple[Case, bool]]:
        """Each case, eager and, where it can be, as a graph."""
        eager = [(case, False) for case in self._cases()]
        return eager + [(case, True) for case, _ in eager if self._can_replay(case)]

    def _can_replay(self, case: Case) -> bool:
        return case in self._graphs and self.measured[case].graph_failure is None

    def _check(self, case: Case) -> None:
        """Two layers (even and odd); the last one's result against the reference."""
        found = self.measured[case]
        failure = None
        try:
            layer = self.layer(case)
            layer()
            if case in self._torus:
                self._torus[case].reset_stats()
            out = layer()
            if case in self._torus:
                self._note_plan(found, self._torus[case])
            if case.kind != "comm":
                found.relative_error = self._error(case, out)
                if not found.relative_error <= self._max_error(case):
                    failure = f"wrong: relative error {found.relative_error:.2g}"
            self._synchronize()
        except NotRunnable as error:
            failure = str(error)
        except Exception as error:
            failure = f"{type(error).__name__}: {_first_line(error)}"
        found.failure = self.ranks.first_failure(failure)

    def _note_plan(self, found: Measured, sp: SequenceParallel) -> None:
        """What was planned, what the planner predicted, what one layer has sent."""
        found.plan = sp.describe()
        if sp.predicted_us is not None:
            layer_us, floor_us = sp.predicted_us
            found.predicted_of_floor = round(layer_us / floor_us, 4)
        found.bytes_across = sp.stats()["across_machines"]["bytes"]

    def _error(self, case: Case, out: Tensor) -> float:
        if case.kind == "floor":
            return relative_error(out[:, self._checked_whole], self._expected_heads)
        return relative_error(out[:, self._checked_rows], self._expected_rows)

    def _max_error(self, case: Case) -> float:
        return MAX_ERROR[self.config.dtype]

    def _plan_turns(self) -> int:
        """How many layers each case's turn takes and how many rounds fit; capture the graphs."""
        round_s = 0.0
        for case in self._cases():
            ms = max(self.ranks.gather(self._time(self.layer(case), 2)[0]))
            pairs = max(1, min(MAX_TURN_LAYERS // 2, round(TURN_MS / max(ms, 1e-3) / 2)))
            # Even: eager turns and graphs leave the slots of even and odd layers as they were.
            self.measured[case].layers = 2 * pairs
            num_modes = 2 if self._wants_graph(case) else 1
            round_s += num_modes * (2 * pairs * ms / 1e3 + 2e-3)
            if self._wants_graph(case):
                self._capture(case)
        if self.config.rounds is not None:
            return self.config.rounds
        wanted = max(self.ranks.gather(self.config.seconds / max(round_s, 1e-6)))
        return max(MIN_ROUNDS, min(MAX_ROUNDS, int(wanted)))

    def _wants_graph(self, case: Case) -> bool:
        if case.layer_graphs:  # of eager layers; one that is captured is captured as it is
            return False
        return self.config.graph and (self.config.stock_graph or not case.is_stock)

    def _graph_pool(self, case: Case) -> Any:
        """The memory that ``case``'s graph shares with others; by default it has its own."""
        return None

    def _capture(self, case: Case) -> None:
        found, failure = self.measured[case], None
        layer = self.layer(case)
        stream = torch.cuda.current_stream()
        try:
            eager = layer().clone()
            layer()
            self._synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as NCCL's watchdog, may query events meanwhile.
            with torch.cuda.graph(
                graph, pool=self._graph_pool(case), capture_error_mode="thread_local"
            ):
                for _ in range(found.layers):
                    out = layer()
            self._graphs[case] = (graph, out)
        except Exception as error:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own in place
            failure = f"{type(error).__name__}: {_first_line(error)}"
        # No rank replays what a peer could not capture.
        found.graph_failure = self.ranks.first_failure(failure)
        if found.graph_failure is None:
            graph.replay()
            graph.replay()
            self._synchronize()
            found.graph_same_bits = bool(torch.equal(out, eager))
            if not found.graph_same_bits and case.kind != "comm":
                difference = self._error(case, out)
                if not difference <= self._max_error(case):
                    failure = f"wrong: relative error {difference:.2g}"
            found.graph_failure = self.ranks.first_failure(failure)

    def _turn(self, case: Case, is_graph: bool) -> None:
        found = self.measured[case]
        if is_graph:
            graph, _ = self._graphs[case]
            # One replay is a turn's layers.
            ms, _ = self._time(graph.replay, 1, head_start=True)
            found.graph_ms.append(ms / found.layers)
            return
        ms, host_us = self._time(self.layer(case), found.layers)
        found.eager_ms.append(ms)
        if self.on_gpu:
            found.host_us.append(host_us)

    def _time(
        self, run: Callable[[], Any], num_calls: int, *, head_start: bool = False
    ) -> tuple[float, float]:
        """Milliseconds of a call, of ``num_calls``, and the host's microseconds to enqueue it.

        With ``head_start`` the GPU idles first for longer than the host takes to launch a graph,
        whose launch is then not part of what is timed.
        """
        self._synchronize()
        self.ranks.barrier()
        if not self.on_gpu:
            start_s = time.perf_counter()
            for _ in range(num_calls):
                run()
            ms = (time.perf_counter() - start_s) * 1e3 / num_calls
            return ms, ms * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if head_start:
            torch.cuda._sleep(HEAD_START_CYCLES)
        # The GPUs leave this together, closer than the hosts leave their barrier.
        dist.all_reduce(self._token)
        start.record()
        host_s = []
        for idx in range(num_calls):
            begin_s = time.perf_counter()
            run()
            if idx < HOST_LAYERS:
                host_s.append(time.perf_counter() - begin_s)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / num_calls, statistics.median(host_s) * 1e6

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def _spread(num_rows: int) -> Tensor:
    """Up to CHECKED_ROWS row indices, the first and the last among them."""
    count = min(CHECKED_ROWS, num_rows)
    return torch.linspace(0, num_rows - 1, count, dtype=torch.float64).round().long()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def measure(config: BenchConfig, report: Callable[[str, Any], None]) -> None:
    """Run every shape in the default process group.

    ``report("machine", ...)`` comes first, then ``report("shape", results)`` after each shape.
    """
    ranks = Ranks()
    if ranks.rank == 0:
        report("machine", {"hardware": machine.hardware(), "versions": machine.versions()})
    stock = StockUsp(config)
    # A config with cases of its own brings along what runs them.
    bench_type: type[LayerBench] = getattr(config, "bench_type", LayerBench)
    with torch.no_grad():
        for shape in config.shapes:
            start_s = time.monotonic()
            with ExitStack() as resources:
                bench = bench_type(config, shape, ranks, stock, resources)
                results = bench.run()
                # Peers may still read this rank's memory.
                ranks.barrier()
            del bench
            gc.collect()
            if config.device == "cuda":
                torch.cuda.empty_cache()
            results["seconds"] = round(time.monotonic() - start_s, 1)
            report("shape", {"shape": vars(shape), **results})
