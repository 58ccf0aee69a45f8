"""A fused kernel whose peer never sends stops by itself and says for which flag it waited."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NAME = 1234  # of the flag
SCRIPT = f"""
import time
import torch
from swiftfusion_xdit.attention.fa4_fused import FusedLaunches
from swiftfusion_xdit.attention.fused import CHUNK_BITS, RemoteKeys
from swiftfusion_xdit.plan import FUSED_TILE_ROWS

rows, heads, dim = 300, 3, 64
ours = [torch.randn(1, rows, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
theirs = [torch.randn_like(x[:, :1]).expand(1, FUSED_TILE_ROWS, heads, dim).contiguous()
          for x in ours[1:]]
flag = torch.zeros(1, device="cuda", dtype=torch.int32)
note = torch.zeros(1, dtype=torch.int32).pin_memory()


def remote(set_flag):
    flag.fill_(set_flag)
    integers = {{"dtype": torch.int64, "device": "cuda"}}
    return RemoteKeys(
        k=theirs[0].data_ptr(),
        v=theirs[1].data_ptr(),
        num_rows=FUSED_TILE_ROWS,
        num_keys=FUSED_TILE_ROWS + rows,
        begins=torch.tensor([1 << CHUNK_BITS], dtype=torch.int32, device="cuda"),
        flags=torch.tensor([[[flag.data_ptr(), {NAME}]] * heads], **integers),
        counter=torch.zeros(1, dtype=torch.int32, device="cuda"),
        clears=torch.tensor([flag.data_ptr()], **integers),
        frees=torch.tensor([], **integers),
        note=note.data_ptr(),
        deadline_ns=int(0.2e9),
    )


launches, out = FusedLaunches(torch.device("cuda")), torch.empty_like(ours[0])
launches.run(*ours, dim**-0.5, out, remote(1))
q, k, v = (x.float().transpose(1, 2) for x in (
    ours[0], torch.cat([theirs[0], ours[1]], 1), torch.cat([theirs[1], ours[2]], 1)))
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
error = float((out.float() - expected).norm() / expected.norm())
print(f"with its flag: {{'exact' if error < 1e-2 else error}}, cleared to {{int(flag)}}")
start = time.monotonic()
launches.run(*ours, dim**-0.5, out, remote(0))
try:
    torch.cuda.synchronize()
    print("without: it ended")
except RuntimeError:
    seconds = time.monotonic() - start
    print(f"without: note {{int(note)}}, {{'in time' if 0.1 < seconds < 10 else seconds}}")
"""


def test_deadline() -> None:
    pytest.importorskip("flash_attn.cute.interface", reason="needs flash-attn-4")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "with its flag: exact, cleared to 0",
        f"without: note {NAME}, in time",
    ], done.stderr[-3000:]
