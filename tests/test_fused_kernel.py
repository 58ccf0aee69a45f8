"""The kernel that waits for its peers compiles for Hopper, also where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("flash_attn", "cutlass", "quack")),
    reason="needs flash-attn-4",
)
SCRIPT = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from swiftfusion_xdit.attention import fa4_fused
from swiftfusion_xdit.plan import FUSED_TILE_ROWS

bf16, fp16 = torch.bfloat16, torch.float16


def refusal(dtype, head_dim, shared_by, tile_rows=FUSED_TILE_ROWS):
    kind = {"dtype": dtype, "head_dim": head_dim, "shared_by": shared_by}
    return launches.not_fused_because(**kind, tile_rows=tile_rows)


with FakeTensorMode():
    launches = fa4_fused.FusedLaunches(torch.device("cuda"))
    for dtype, head_dim, shared_by in (
        (bf16, 128, 1), (fp16, 64, 1), (bf16, 128, 4), (bf16, 64, 3)
    ):
        assert refusal(dtype, head_dim, shared_by) == ""
        assert callable(launches._compiled[dtype, head_dim, shared_by])
    assert "has head dims" in refusal(bf16, 96, 1)
    assert "loads 128 keys, not 64" in refusal(bf16, 128, 1, tile_rows=64)

    def broken(*tensors):
        raise TypeError("another package\\nat length")

    fa4_fused._extension()[0].compile_kernel = broken
    assert refusal(bf16, 128, 2) == "not compiled: TypeError: another package"
print("compiled")
"""


def test_compiles_without_a_gpu() -> None:
    env = {
        **os.environ,
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300
    )
    assert "compiled" in done.stdout, done.stderr[-3000:]
