"""Times plans where they will run, to choose between what the planner holds for about as fast.

Predictions are off by a few percent, and by more on machines that nobody has measured. The time of
a plan is the slowest rank's, so all ranks choose alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swiftfusion_xdit.agreement import Agreement
from swiftfusion_xdit.plan import AttentionShape, Plan
from swiftfusion_xdit.runtime import LayerRunner

WARM_LAYERS, WINDOWS, LAYERS = 4, 5, 2  # even: slots of even and odd layers stay as they were
MARGIN = 0.02  # what must be won over a plan that was predicted to be faster


def fastest(
    plans: Sequence[Plan],
    make_runner: Callable[[Plan], LayerRunner],
    agreement: Agreement,
    rank: int,
    device: torch.device,
) -> tuple[int, list[float]]:
    """Collective: which plan is fastest, and microseconds of a layer of each.

    Args:
        plans: the best predicted one first; one is held in memory at a time.
        make_runner: collective.
        rank: this rank's place in the plans.
    """
    inputs = _inputs(plans[0].shape, rank, device)
    times_us = [_time_us(make_runner(plan), inputs, agreement, device) for plan in plans]
    best = 0
    for number, time_us in enumerate(times_us):
        if time_us < times_us[best] * (1 - MARGIN):
            best = number
    return best, times_us


def _inputs(shape: AttentionShape, rank: int, device: torch.device) -> list[Tensor]:
    sizes = [(shape.query_lengths, shape.num_heads), *[(shape.key_lengths, shape.num_kv_heads)] * 2]
    return [
        torch.randn(
            (shape.batch, lengths[rank], heads, shape.head_dim), dtype=shape.dtype, device=device
        )
        for lengths, heads in sizes
    ]


def _time_us(
    runner: LayerRunner, inputs: list[Tensor], agreement: Agreement, device: torch.device
) -> float:
    """The median of several windows, on the slowest rank. Closes the runner."""
    scale = inputs[0].shape[3] ** -0.5

    def run(layers: int) -> None:
        for _ in range(layers):
            runner.run(*inputs, scale=scale, context="a layer that is timed")

    try:
        agreement.barrier("flags of timed layers")  # then all are ready for puts
        run(WARM_LAYERS)
        windows = []
        for _ in range(WINDOWS):
            _synchronize(device)
            agreement.barrier("the start of a timed layer")
            begin_s = time.perf_counter()
            run(LAYERS)
            _synchronize(device)
            windows.append((time.perf_counter() - begin_s) * 1e6 / LAYERS)
        mine_ns = round(statistics.median(windows) * 1e3)
        return max(time_ns for (time_ns,) in agreement.gather("times", (mine_ns,))) / 1e3
    finally:
        runner.close()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
