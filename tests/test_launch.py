"""A launched program leaves nothing behind, and its failure says what happened."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from swiftfusion_xdit.cli.launch import LaunchError, launch

# A program that starts a grandchild in a session of its own, as torchrun does, and names it.
PARENT = """
    import subprocess, sys, time
    code = "import time; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    open("grandchild", "w").write(str(child.pid))
    time.sleep(600)
"""


def run(source: str, folder: Path, *, timeout_s: float = 60.0, on_poll=lambda: None) -> None:
    script = folder / "program.py"
    script.write_text(textwrap.dedent(source), encoding="utf-8")
    command = [sys.executable, str(script)]
    log = folder / "log"
    launch(command, log=log, cwd=folder, env=os.environ, timeout_s=timeout_s, on_poll=on_poll)


def assert_ended(pid: int) -> None:
    """A killed orphan is a zombie until whoever inherited it looks; that is ended too."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


def test_output_of_a_good_run_is_in_the_log(tmp_path: Path) -> None:
    run("print('hello')", tmp_path)
    assert (tmp_path / "log").read_text() == "hello\n"


def test_failure_shows_status_first_error_tail_and_log(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as failure:
        run(
            """
            import sys
            print("[rank2]: ValueError: the cause", file=sys.stderr)
            print("torch.distributed.elastic.ChildFailedError: the consequence", file=sys.stderr)
            print("last words", file=sys.stderr)
            sys.exit(3)
            """,
            tmp_path,
        )
    message = str(failure.value)
    assert "exit status 3" in message
    assert "first error in the log: ValueError: the cause" in message
    assert "last words" in message
    assert str(tmp_path / "log") in message


def test_deadline_ends_the_whole_family(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no end within 3 s"):
        run(PARENT, tmp_path, timeout_s=3.0)
    assert_ended(int((tmp_path / "grandchild").read_text()))


def test_interrupt_ends_the_whole_family(tmp_path: Path) -> None:
    def interrupt() -> None:
        started = tmp_path / "grandchild"
        if started.exists() and started.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(PARENT, tmp_path, on_poll=interrupt)
    assert_ended(int((tmp_path / "grandchild").read_text()))
