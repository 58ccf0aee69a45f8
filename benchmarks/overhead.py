"""What a layer costs a rank beside attention, merges and copies."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit import SequenceParallel, runtime
from swiftfusion_xdit.attention import cpu
from swiftfusion_xdit.comm.shm import ShmCommunicator

SMALL_ROWS = 16
NUM_LAYERS = 20
PAYLOAD = ("attention", "merges", "copies")


class PartMeter:
    """CPU time of this thread inside attention kernels, merges, copies and waits."""

    def __init__(self) -> None:
        self.ns = dict.fromkeys((*PAYLOAD, "waits"), 0)
        self.num_calls = 0
        self._inside = False

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # a copy that a merge makes is part of the merge
                return function(*args, **kwargs)
            self._inside = True
            start_ns = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.ns[part] += time.thread_time_ns() - start_ns
                self.num_calls += 1
                self._inside = False

        return metered

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as patches:
            for part, owner, name in (
                ("attention", cpu, "_kernel"),
                ("merges", runtime, "merge"),
                ("copies", torch.Tensor, "copy_"),
                ("waits", ShmCommunicator, "wait"),
            ):
                wrapped = self.wrap(part, getattr(owner, name))
                patches.enter_context(mock.patch.object(owner, name, wrapped))
            yield

    @classmethod
    def own_ns(cls, num_calls: int = 20_000) -> float:
        """CPU time that metering one call adds outside what it meters."""
        meter = cls()
        nothing = meter.wrap("waits", lambda: None)
        start_ns = time.thread_time_ns()
        for _ in range(num_calls):
            nothing()
        return (time.thread_time_ns() - start_ns - meter.ns["waits"]) / num_calls


def measure_overhead(sp: SequenceParallel, rows: list[Tensor]) -> dict[int, dict[str, list[float]]]:
    """CPU time of this rank's layers by part: of these ``rows``, and of the first SMALL_ROWS.

    ``overhead`` is all that is not PAYLOAD; ``waits``, a part of it, is what looking for a peer's
    signal costs (the time asleep costs none).

    Args:
        rows: this rank's q, k and v.

    Returns:
        by row count and part, microseconds of each layer.
    """
    own_ns = PartMeter.own_ns()
    samples: dict[int, dict[str, list[float]]] = {}
    for num_rows in dict.fromkeys((rows[0].shape[1], min(SMALL_ROWS, rows[0].shape[1]))):
        layers = samples[num_rows] = {}
        few = [x[:, :num_rows].contiguous() for x in rows]
        sp.attention(*few)
        for _ in range(NUM_LAYERS):
            for part, ns in _layer(sp, few, own_ns).items():
                layers.setdefault(part, []).append(ns / 1e3)
    return samples


def _layer(sp: SequenceParallel, rows: list[Tensor], own_ns: float) -> dict[str, float]:
    meter = PartMeter()
    with meter.installed():
        dist.barrier()
        start_ns = time.thread_time_ns()
        sp.attention(*rows)
        total_ns = time.thread_time_ns() - start_ns
    payload_ns = sum(meter.ns[part] for part in PAYLOAD)
    assert payload_ns > 0
    return {**meter.ns, "overhead": total_ns - payload_ns - meter.num_calls * own_ns}
