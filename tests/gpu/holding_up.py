"""Starts the ranks of `held_up` and returns how the survivor ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from swiftfusion_xdit.comm.watchdog import EXIT_STATUS
from tests.gpu.held_up import TURNS_BEFORE, VICTIM

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0


def hold_up(transport: str, how: str, directory: Path, *, timeout_s: float) -> None:
    """Check what the survivor reports and how it ends; and the stopped one, once it goes on."""
    command = [sys.executable, "-m", "tests.gpu.held_up", transport]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(directory), how, str(timeout_s)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        for rank in range(2)
    ]
    try:
        survivor, victim = ranks[1 - VICTIM], ranks[VICTIM]
        out, err = survivor.communicate(timeout=START_S + timeout_s)
        shown = f"{transport} {how}: status {survivor.returncode}\n{out}\n{err}"
        assert survivor.returncode == EXIT_STATUS, shown
        assert "finished" not in out, shown
        state = "has exited" if how == "kill" else r"is alive \(stopped\)"
        assert re.search(
            rf"rank 0 of 2 in attention call {TURNS_BEFORE + 1}: no progress for \d+\.\d s of at "
            rf"most {timeout_s:g} s; waits for FULL of parity {TURNS_BEFORE % 2} \(flag "
            rf"{TURNS_BEFORE % 2}\) from rank {VICTIM}: expected 1, seen 0; rank {VICTIM}'s "
            rf"process {victim.pid} {state}",
            err,
        ), shown
        if how == "stop":
            os.kill(victim.pid, signal.SIGCONT)
            _, err = victim.communicate(timeout=60)
            # What it waited for was there: it may finish, or find its peer dead.
            assert victim.returncode in (0, EXIT_STATUS), err
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
