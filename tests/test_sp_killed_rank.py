"""A rank that dies or stops in the middle of a layer is reported by all others, and ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WORLD_SIZE = 4
VICTIM = 2

SCRIPT = f"""
import os, signal, sys, torch
import torch.distributed as dist
from swiftfusion_xdit.sequence_parallel import SequenceParallel
from swiftfusion_xdit.attention.cpu import CpuBackend

rank = int(sys.argv[1])
dist.init_process_group(
    "gloo", init_method="file://" + sys.argv[2], rank=rank, world_size={WORLD_SIZE}
)
q = torch.randn(1, 8, 4, 8)
with SequenceParallel(machines=2, mesh="torus=2,ring=2") as sp:
    sp.attention(q, q, q)
    if rank == {VICTIM}:
        forward = CpuBackend.forward

        def stop_in_the_middle(self, *args):
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))
            return forward(self, *args)

        CpuBackend.forward = stop_in_the_middle
    print("started", flush=True)
    sp.attention(q, q, q)
    sp.attention(q, q, q)
print("finished", flush=True)
"""


def segments() -> set[Path]:
    return set(Path("/dev/shm").glob("swiftfusion-*"))


@pytest.mark.parametrize(
    ("name", "timeout_s", "state"), [("SIGKILL", 120, "exited"), ("SIGSTOP", 3, "alive")]
)
def test_others_report_and_exit(tmp_path: Path, name: str, timeout_s: int, state: str) -> None:
    before = segments()
    env = {**os.environ, "SWIFTFUSION_TIMEOUT_S": str(timeout_s), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store"), name],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    reports = []
    try:
        for rank, process in enumerate(ranks):
            if rank == VICTIM:
                continue
            out, err = process.communicate(timeout=100)
            assert process.returncode == 1, (rank, process.returncode, err)
            assert "started" in out and "finished" not in out
            report = err.strip().splitlines()[-1]
            assert f"rank {rank} of {WORLD_SIZE} in attention call" in report, report
            assert "expected 1, seen 0" in report and "step" in report, report
            reports.append(report)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGCONT)
            process.kill()
    # Ranks that waited for the victim itself say what became of it.
    about_victim = [report for report in reports if f"from rank {VICTIM}" in report]
    assert about_victim, reports
    assert all(state in report for report in about_victim), about_victim
    assert segments() <= before
