"""Runs a program with its children: log file, deadline, and nothing left behind."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

_POLL_S = 0.2
_GRACE_S = 10.0
_TAIL_LINES = 30
# What a Python process prints last when it dies, with torchrun's `[rank2]: ` before it or not.
_ERROR_LINE = re.compile(r"^(?:\[[^\]]*\]:?\s*)*((?:\w+\.)*\w*(?:Error|Exception|Timeout)\b.*)$")


class LaunchError(RuntimeError):
    """A launched program failed or ran past its deadline; the message holds what its log says."""


def launch(
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    env: Mapping[str, str],
    timeout_s: float,
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `command` to its end, its output in `log`; `on_poll` is called some times a second.

    However this returns, by an exception too, the program and all that it started are gone.

    Raises:
        LaunchError: exit status other than zero, or no end within `timeout_s` seconds.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the others
        )
        deadline = time.monotonic() + timeout_s
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise LaunchError(_failure(f"no end within {timeout_s:g} s", command, log))
                on_poll()
                time.sleep(_POLL_S)
        finally:
            _end(process)
    if process.returncode != 0:
        status = process.returncode
        what = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
        raise LaunchError(_failure(what, command, log))
    on_poll()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End `process` and all its descendants, those in sessions of their own included."""
    if process.poll() is not None:
        return
    try:
        # Named now: once their parent has ended nothing tells whose they were.
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(timeout=_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(child)
        _, family = psutil.wait_procs(family, timeout=_GRACE_S)


def _failure(what: str, command: Sequence[str], log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip()]
    parts = [f"{what}: {' '.join(command)}"]
    # The first error is the cause; later ones are ranks that lost their peer.
    errors = [found.group(1) for line in lines if (found := _ERROR_LINE.match(line))]
    if errors:
        parts.append(f"first error in the log: {errors[0]}")
    parts.append(f"the log's last lines ({log}):")
    parts.extend(f"  | {line}" for line in lines[-_TAIL_LINES:])
    return "\n".join(parts)


def free_port() -> int:
    """A TCP port that was free on this host a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
