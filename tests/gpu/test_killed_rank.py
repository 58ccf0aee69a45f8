"""Ranks whose peer dies or stops in mid-layer report and exit: no GPU waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.ranks import RANKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SCRIPT = """
import os, signal, sys, torch
import torch.distributed as dist
from swiftfusion_xdit.sequence_parallel import SequenceParallel

rank, size = int(sys.argv[1]), int(sys.argv[2])
store, name, backend, mesh, schedule = sys.argv[3:]
torch.cuda.set_device(rank % torch.cuda.device_count())
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=size)
q = torch.randn(1, 512, 4, 64, device="cuda", dtype=torch.bfloat16)
sp = SequenceParallel(mesh=mesh, schedule=schedule, backend=backend, device="cuda")
for _ in range(4):
    sp.attention(q, q, q)
torch.cuda.synchronize()
assert schedule in ("auto", sp.plan.schedule.name), sp.plan
print("started", flush=True)
if rank == size - 1:
    os.kill(os.getpid(), getattr(signal, name))
sp.attention(q, q, q)
torch.cuda.synchronize()
print("finished", flush=True)
"""


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(("name", "timeout_s"), [("SIGKILL", 60), ("SIGSTOP", 4)])
@pytest.mark.parametrize(
    "how", [("sdpa_flash", "torus", "auto"), ("fa4", "ring", "fused")], ids=["stream", "kernel"]
)
def test_the_other_ranks_report_and_exit(
    tmp_path: Path, name: str, timeout_s: int, how: tuple[str, str, str], num_ranks: int
) -> None:
    backend, axis, schedule = how
    if backend == "fa4":
        pytest.importorskip("flash_attn.cute.interface", reason="needs flash-attn-4")
    env = {
        **os.environ,
        "SWIFTFUSION_TIMEOUT_S": str(timeout_s),
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    }
    store, mesh = str(tmp_path / "store"), f"{axis}={num_ranks}"
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SCRIPT,
                str(rank),
                str(num_ranks),
                store,
                name,
                backend,
                mesh,
                schedule,
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        ended = [process.communicate(timeout=50) for process in ranks[:-1]]
    finally:
        for process in ranks:
            process.kill()
    for rank, (out, err) in enumerate(ended):
        assert "started" in out and "finished" not in out, (rank, out, err)
        assert ranks[rank].returncode == 13, (rank, ranks[rank].returncode, out, err)
        assert f"rank {rank} of {num_ranks} in attention call 5" in err, err
    last = num_ranks - 1
    assert any(f"from rank {last}: expected 1, seen 0" in err for _, err in ended), ended
