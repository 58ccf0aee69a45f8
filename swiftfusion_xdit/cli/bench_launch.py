"""Starts the ranks of `swiftfusion bench` on this host, and leaves none behind."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from swiftfusion_xdit.cli.bench_config import BenchConfig

HOST = "127.0.0.1"
GROUP_TIMEOUT_S = 180.0  # for one collective; also how long a rank waits for a peer's flag
_GRACE_S = 5.0


class BenchError(RuntimeError):
    """A rank raised, died, or the run took too long; all ranks have been ended."""


def run_ranks(config: BenchConfig, on_report: Callable[[str, Any], None]) -> None:
    """Run ``bench_ranks.measure`` on every rank; ``on_report`` gets what rank 0 reports.

    Raises:
        BenchError: naming the rank, with its traceback or exit status.
    """
    # A fresh interpreter each: CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    # Here, where its port is known before the first rank starts.
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    ranks: list[tuple[Any, connection.Connection]] = []
    try:
        for rank in range(config.ranks):
            pipe, remote = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, config, store.port, remote), daemon=True
            )
            process.start()
            remote.close()  # so that reading the pipe ends when the process does
            ranks.append((process, pipe))
        _collect(ranks, config.timeout_s, on_report)
    finally:
        _end([process for process, _ in ranks])


def _collect(
    ranks: list[tuple[Any, connection.Connection]],
    timeout_s: float,
    on_report: Callable[[str, Any], None],
) -> None:
    deadline = time.monotonic() + timeout_s
    waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(str(rank) for rank in waiting.values())
            raise BenchError(f"ranks {late} were not done within {timeout_s:g} s")
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank = waiting[pipe]
            try:
                kind, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                raise BenchError(_death(rank, ranks[rank][0])) from None
            if kind == "error":
                raise BenchError(f"rank {rank} of {len(ranks)} failed:\n{value}")
            if kind == "done":
                del waiting[pipe]
            elif rank == 0:
                on_report(kind, value)


def _death(rank: int, process: Any) -> str:
    process.join(_GRACE_S)
    code = process.exitcode
    if code is None:
        return f"rank {rank} closed its pipe and runs on"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"the process of rank {rank} ended without a result ({how})"


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.join(_GRACE_S if process.exitcode == 0 else 0.1)
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def _serve(rank: int, config: BenchConfig, port: int, pipe: connection.Connection) -> None:
    """A rank's process."""
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends all ranks
    try:
        os.environ.update(rank_environment(rank, config))
        _join(rank, config, port)
        from swiftfusion_xdit.cli.bench_ranks import measure

        measure(config, lambda kind, value: pipe.send((kind, value)) if rank == 0 else None)
        pipe.send(("done", None))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        # No orderly end: peers may never answer, and the parent ends them.
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def rank_environment(rank: int, config: BenchConfig) -> dict[str, str]:
    """What a launcher would set, and how NCCL is to see the machines."""
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(config.ranks),
        "LOCAL_WORLD_SIZE": str(config.ranks),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    env["XDIT_LOGGING_LEVEL"] = os.environ.get("XDIT_LOGGING_LEVEL", "ERROR")
    env["SWIFTFUSION_TIMEOUT_S"] = os.environ.get("SWIFTFUSION_TIMEOUT_S", str(GROUP_TIMEOUT_S))
    if config.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    if config.tcp:
        machine = rank // (config.ranks // config.machines)
        env |= {
            "NCCL_HOSTID": f"swiftfusion-machine-{machine}",
            "NCCL_NET": "Socket",
            "NCCL_IB_DISABLE": "1",
            "NCCL_SOCKET_IFNAME": "lo",
        }
    return env


def _join(rank: int, config: BenchConfig, port: int) -> None:
    backend = "gloo"
    if config.device == "cuda":
        torch.cuda.set_device(rank)
        backend = "nccl"
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        store=dist.TCPStore(HOST, port, is_master=False, wait_for_workers=False),
        rank=rank,
        world_size=config.ranks,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )


def _end_with_parent(pipe: connection.Connection) -> None:
    """Ends this process when its parent is gone, whatever it is busy with."""
    hangup = select.poll()
    hangup.register(pipe.fileno(), 0)  # no events: a hangup is always reported
    hangup.poll()
    os._exit(1)
