"""The kernel that waits for its peers compiles for Hopper, also where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

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


KEPT = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from swiftfusion_xdit.attention import fa4_fused

if "anew" not in sys.argv:
    fa4_fused._extension()[0].compile_kernel = None
with FakeTensorMode():
    launches = fa4_fused.FusedLaunches(torch.device("cuda"))
    kind = {"dtype": torch.bfloat16, "head_dim": 64, "shared_by": 1}
    print(launches.not_fused_because(**kind, tile_rows=128) or "ready")
"""


def run(script: str, *args: str, **env: str) -> str:
    """What it prints, in a process that takes itself for one on a Hopper GPU."""
    hopper = {
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", script, *args]
    env = {**os.environ, **hopper, **env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.stdout.strip() or done.stderr[-3000:]


def test_compiles_without_a_gpu() -> None:
    assert run(SCRIPT) == "compiled"


def test_is_kept_on_disk_where_the_package_keeps_its_own(tmp_path: Path) -> None:
    on_disk = {
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(tmp_path),
    }
    assert "not compiled" in run(KEPT, **on_disk)
    assert run(KEPT, "anew", **on_disk) == "ready"
    assert run(KEPT, **on_disk) == "ready"
