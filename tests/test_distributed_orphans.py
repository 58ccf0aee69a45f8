"""No rank outlives the test process, even if that is killed while a rank is busy."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

BUSY = """
import os, sys, time
from tests.distributed import RankPool
from tests.test_distributed_launcher import read_env, sleep_on

if __name__ == "__main__":
    pool = RankPool(2)
    print(*(pid for _, _, pid in pool.run(read_env, "HOME")), flush=True)
    pool.run(sleep_on, 1)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ranks_end_when_the_test_process_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    root = str(Path(__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": "/", "PYTHONPATH": root},
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert is_running(pids[1])
        parent.kill()
    deadline = time.monotonic() + 30.0
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in pids), pids
