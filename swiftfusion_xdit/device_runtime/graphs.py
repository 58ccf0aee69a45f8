"""Layers that come again, as CUDA graphs: one launch in place of every copy, flag and kernel.

Outside a capture the host enqueues each operation of each layer, which at small sizes takes it
longer than the GPU takes for them. A caching allocator gives a model the same addresses in every
step; the second layer with the same inputs, results and slots is captured, and repeated from then
on. What a graph does and in which order is what the program says: peers cannot tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

logger = logging.getLogger(__name__)

MOST_GRAPHS = 128
MOST_SEEN = 4096  # layers that are remembered to have come once


class LayerGraphs:
    """The graphs of one plan on one rank, by all that tells its layers apart."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()
        self._is_open = True

    def find(self, key: Hashable) -> torch.cuda.CUDAGraph | None:
        return self._graphs.get(key)

    def is_wanted(self, key: Hashable) -> bool:
        """Whether to capture this layer: it has come before, and there is room."""
        if key in self._seen:
            return self._is_open and len(self._graphs) < MOST_GRAPHS
        if len(self._seen) < MOST_SEEN:
            self._seen.add(key)
        return False

    def capture(
        self, key: Hashable, stream: torch.cuda.Stream, enqueue: Callable[[], None]
    ) -> torch.cuda.CUDAGraph | None:
        """What ``enqueue`` enqueues from ``stream`` on, as a graph; None if it cannot be captured.

        Nothing runs. Unlike ``torch.cuda.graph`` this neither waits for the device, which may be
        waiting for a peer, nor gives the allocator's memory back, which would move the addresses.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                # Other threads, such as NCCL's watchdog, may query events meanwhile.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    enqueue()
                finally:
                    torch.cuda.set_stream(stream)
                    graph.capture_end()
        except RuntimeError as error:
            self._is_open = False
            logger.warning("layers are not captured in graphs: %s", str(error).splitlines()[0])
            return None
        self._graphs[key] = graph
        return graph
