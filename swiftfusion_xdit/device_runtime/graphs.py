"""Layers that come again, as CUDA graphs: one launch in place of every copy, flag and kernel.

Outside a capture the host enqueues each operation of each layer, which at small sizes takes it
longer than the GPU takes for them: plans of such sizes have their layers captured by default. A
caching allocator gives a model the same addresses in every step; the second layer with the same
inputs, results and slots is captured, and repeated from then on. What a graph does and in which
order is what the program says: peers cannot tell.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from swiftfusion_xdit import envs
from swiftfusion_xdit.plan import Plan

MOST_GRAPHS = 128
MOST_SEEN = 4096  # layers that are remembered to have come once
# Of attention on a rank: about 1 ms of an H200, where the host takes 0.3 to 0.6 ms for a layer. On
# four of them a step of FLUX.1 with 0.07e12 a layer took 13 % less with graphs, one with 0.88e12
# took 1 % more; nothing between was measured (benchmarks/results/layer_graphs.md).
HOST_BOUND_FLOP = 0.6e12


def wants_graphs(plan: Plan, layer_graphs: bool | None) -> bool:
    """Whether layers of a plan are to be repeated as graphs.

    Args:
        layer_graphs: None: where the host is the bound, as far as the plan's sizes tell.
    """
    if layer_graphs is not None:
        return layer_graphs
    shape = plan.shape
    pairs = sum(shape.query_lengths) * sum(shape.key_lengths)
    flop = 4.0 * shape.batch * shape.num_heads * shape.head_dim * pairs / plan.mesh.size
    return flop < HOST_BOUND_FLOP


class LayerGraphs:
    """The graphs of one plan on one rank, by all that tells its layers apart."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()

    @cached_property
    def _pool(self) -> Any:
        """The memory that captured layers take beside the plan's: they follow one another."""
        return torch.cuda.graph_pool_handle()

    def find(self, key: Hashable) -> torch.cuda.CUDAGraph | None:
        return self._graphs.get(key)

    def is_wanted(self, key: Hashable) -> bool:
        """Whether to capture this layer: it has come before, and there is room."""
        if key in self._seen:
            return len(self._graphs) < MOST_GRAPHS
        if len(self._seen) < MOST_SEEN:
            self._seen.add(key)
        return False

    def capture(
        self, key: Hashable, stream: torch.cuda.Stream, enqueue: Callable[[], None]
    ) -> torch.cuda.CUDAGraph:
        """What ``enqueue`` enqueues from ``stream`` on, as a graph. Nothing runs.

        Unlike ``torch.cuda.graph`` this neither waits for the device, which may be waiting for a
        peer, nor gives the allocator's memory back, which would move the addresses.

        Raises:
            RuntimeError: it cannot be captured. What torch keeps about a capture is in no state to
                go on with then.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream), _no_collection():
                # Other threads, such as NCCL's watchdog, may query events meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                enqueue()
                graph.capture_end()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            variable = envs.variable_name("LAYER_GRAPHS")
            raise RuntimeError(
                f"a layer was not captured as a CUDA graph ({reason}); with {variable}=0 none is"
            ) from error
        self._graphs[key] = graph
        return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """What a collection lets go of, such as a graph, may need a call that a capture forbids."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
