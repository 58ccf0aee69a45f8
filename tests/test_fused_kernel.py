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
for head_dim, shared_by, dtype in (
    (128, 1, bf16), (64, 1, fp16), (128, 4, bf16), (64, 3, bf16)
):
    assert fa4_fused.not_fused_because(head_dim, FUSED_TILE_ROWS) == ""
    module, _ = fa4_fused._extension()
    with FakeTensorMode():
        q, k = (
            torch.empty(2, 300, heads, head_dim, dtype=dtype, device="cuda")
            for heads in (12, 12 // shared_by)
        )
        assert module.compile_kernel(q, k, k, q) is not None
assert "has head dims" in fa4_fused.not_fused_because(96, FUSED_TILE_ROWS)
assert "loads 128 keys, not 64" in fa4_fused.not_fused_because(128, 64)
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
