"""A rank whose peer dies or stops in mid-layer reports and exits: no GPU waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SCRIPT = """
import os, signal, sys, torch
import torch.distributed as dist
from swiftfusion_xdit.sequence_parallel import SequenceParallel

rank, store, name, backend, mesh, schedule = int(sys.argv[1]), *sys.argv[2:]
torch.cuda.set_device(rank % torch.cuda.device_count())
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
q = torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16)
sp = SequenceParallel(mesh=mesh, schedule=schedule, backend=backend, device="cuda")
for _ in range(4):
    sp.attention(q, q, q)
torch.cuda.synchronize()
assert schedule in ("auto", sp.plan.schedule.name), sp.plan
print("started", flush=True)
if rank == 1:
    os.kill(os.getpid(), getattr(signal, name))
sp.attention(q, q, q)
torch.cuda.synchronize()
print("finished", flush=True)
"""


@pytest.mark.parametrize(("name", "timeout_s"), [("SIGKILL", 60), ("SIGSTOP", 4)])
@pytest.mark.parametrize(
    "how", [("sdpa_flash", "torus=2", "auto"), ("fa4", "ring=2", "fused")], ids=["stream", "kernel"]
)
def test_the_other_rank_reports_and_exits(
    tmp_path: Path, name: str, timeout_s: int, how: tuple[str, str, str]
) -> None:
    if how[0] == "fa4":
        pytest.importorskip("flash_attn.cute.interface", reason="needs flash-attn-4")
    env = {
        **os.environ,
        "SWIFTFUSION_TIMEOUT_S": str(timeout_s),
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store"), name, *how],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        out, err = ranks[0].communicate(timeout=50)
    finally:
        for process in ranks:
            process.kill()
    assert "started" in out and "finished" not in out, (out, err)
    assert ranks[0].returncode == 13, (ranks[0].returncode, out, err)
    assert "rank 0 of 2 in attention call 5" in err, err
    assert "from rank 1: expected 1, seen 0" in err, err
