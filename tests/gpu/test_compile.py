"""Torus under torch.compile on two GPUs, in xDiT's mode: CUDA graphs with the bits of eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import xdit_calls, xdit_cases
from tests.gpu.ranks import run_on_gpus

pytest.importorskip("xfuser")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"),
]
HEADS, ROWS, HEAD_DIM = 8, 500, 64
TURNS, INPUTS = 300, 4


def two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    usp = xdit_calls.usp_module()
    return usp.USP(usp.USP(q, k, v) * 2, k * 4, v * 2)  # exact in bf16, however it is fused


def compiled(rank: int, size: int, backend: str, schedule: str) -> str:
    """Calls of a compiled function with other inputs each time, and eager layers in between."""
    from torch._dynamo.utils import counters

    with xdit_cases.xdit_groups(), torch.no_grad():
        xdit_calls.start(
            num_heads=HEADS,
            ulysses_degree=size,
            ring_degree=1,
            sp_machines="auto",
            sp_schedule=schedule,
            attention_backend=backend,
        )
        cases = []
        for case in range(INPUTS):
            seeds = [100 * rank + 10 * case + i for i in range(3)]
            parts = [xdit_cases.noise(1, HEADS, ROWS, HEAD_DIM, seed=seed) for seed in seeds]
            cases.append([part.to("cuda", torch.bfloat16) for part in parts])
        expected = [two_layers(*case).clone() for case in cases]
        run = torch.compile(two_layers, fullgraph=True, mode="reduce-overhead")
        for turn in range(TURNS):
            torch.compiler.cudagraph_mark_step_begin()
            case = turn * 3 % INPUTS
            if not torch.equal(run(*cases[case]), expected[case]):
                return f"call {turn} differs"
            if turn % 50 == 0 and not torch.equal(two_layers(*cases[1]), expected[1]):
                return f"eager layers after call {turn} differ"
        skipped = counters["inductor"]["cudagraph_skips"]
        return f"{skipped} graphs were not recorded" if skipped else "same bits"


@pytest.mark.parametrize("schedule", ["pipelined", "fused"])
@pytest.mark.parametrize("backend", ["CUDNN", "FLASH_4"])
def test_compiled_layers_give_the_bits_of_eager(backend: str, schedule: str) -> None:
    if backend == "FLASH_4":
        pytest.importorskip("flash_attn.cute.interface", reason="needs flash-attn-4")
    assert run_on_gpus(2, compiled, backend, schedule) == ["same bits"] * 2
