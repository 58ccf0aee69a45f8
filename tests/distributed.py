"""Starts ranks for tests: real processes with a gloo group, cheap enough for hundreds of cases.

A fork server imports torch once; every rank is forked from it in milliseconds. `run_ranks` uses
fresh processes for one call; `RankPool` keeps them, with their process group, for many calls.

The function that the ranks run must be importable by name (module level), because it travels by
pickle. What it returns travels back by pickle, so tensors come back as copies.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import reprlib
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported by the fork server before the first rank: the first group always, the second one only
# if the collected tests import them too, since they take seconds.
PRELOAD = ("torch", "torch.distributed", "numpy", "pytest", "hypothesis", "swiftfusion_xdit")
PRELOAD_IF_USED = ("diffusers", "transformers", "xfuser")

_END = b""  # sent to a rank instead of work


class RankFailure(RuntimeError):
    """A rank raised, died or did not finish in time. `rank` is None if it concerns all of them.

    The rank's own exception is `__cause__` where it could be pickled.
    """

    def __init__(self, message: str, *, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Returns [fn(rank, world_size, *args) for every rank], each run in a fresh process.

    The first failure ends all ranks and is raised here as RankFailure with its traceback. After
    `timeout_s` seconds all are ended, and RankFailure shows where each one was. The process of a
    rank in `may_die` may end without a result, which is then None.
    """
    with RankPool(world_size) as pool:
        return pool.run(fn, *args, timeout_s=timeout_s, may_die=may_die)


class RankPool:
    """`world_size` processes that share a gloo group and run one function after another.

    Owns its processes: started by the first `run`, ended by `close`. After a failure all of them
    are ended, and the next `run` starts new ones.
    """

    def __init__(self, world_size: int) -> None:
        assert world_size >= 1, f"world_size = {world_size}"
        self.world_size = world_size
        self._ranks: list[_Rank] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout_s: float = 60.0,
        may_die: Collection[int] = (),
    ) -> list[Any]:
        """Like `run_ranks`, in the pool's processes."""
        deadline = time.monotonic() + timeout_s
        work = pickle.dumps((fn, args, dict(os.environ), Path.cwd()))
        what = f"{fn.__module__}.{fn.__qualname__}{reprlib.repr(args)}"
        if not self._ranks:
            self._start(timeout_s)
        try:
            for rank in self._ranks:
                rank.send(work)
            results = self._collect(what, deadline, timeout_s, frozenset(may_die))
        except BaseException:
            self._kill()
            raise
        if any(rank.ended for rank in self._ranks):
            self._kill()
        return results

    def close(self) -> None:
        """Ends the processes: asks first, kills those that do not end within two seconds."""
        for rank in self._ranks:
            rank.send(_END)
        deadline = time.monotonic() + 2.0
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self, timeout_s: float) -> None:
        used = [name for name in PRELOAD_IF_USED if name in sys.modules]
        multiprocessing.set_forkserver_preload([*PRELOAD, *used])
        context = multiprocessing.get_context("forkserver")
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        for idx in range(self.world_size):
            directory = Path(self._directory.name)
            pipe, remote = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(idx, self.world_size, directory, remote, timeout_s),
                daemon=True,
            )
            process.start()
            remote.close()  # so that reading the pipe ends when the process does
            self._ranks.append(_Rank(idx, process, pipe, _stack_path(directory, idx)))

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.pipe.close()
        self._ranks = []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _collect(
        self, what: str, deadline: float, timeout_s: float, may_die: frozenset[int]
    ) -> list[Any]:
        results: list[Any] = [None] * self.world_size
        waiting = {rank.pipe: rank for rank in self._ranks}
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailure(self._timeout_report(what, waiting.values(), timeout_s))
            replies = [waiting.pop(pipe).receive() for pipe in ready]  # type: ignore[call-overload]
            # A failure of one rank makes others fail: the earliest is the one to show.
            for reply in sorted(replies, key=lambda reply: reply.time):
                if reply.died and reply.rank.idx not in may_die:
                    raise RankFailure(_death_report(reply.rank, what), rank=reply.rank.idx)
                if reply.traceback:
                    raise self._failure(reply, what) from reply.exception
                results[reply.rank.idx] = reply.result
        return results

    def _failure(self, reply: _Reply, what: str) -> RankFailure:
        idx = reply.rank.idx
        head = f"rank {idx} of {self.world_size} failed in {what}:"
        return RankFailure(f"{head}\n{reply.traceback}", rank=idx)

    def _timeout_report(self, what: str, late: Collection[_Rank], timeout_s: float) -> str:
        for rank in late:
            rank.dump_stack()
        time.sleep(0.2)
        names = ", ".join(str(rank.idx) for rank in late)
        lines = [f"ranks {names} of {self.world_size} not done after {timeout_s} s: {what}"]
        for rank in late:
            lines.append(f"--- rank {rank.idx} was at:\n{rank.stack_path.read_text()}")
        return "\n".join(lines)


class _Rank:
    """The parent's end of one process."""

    def __init__(
        self, idx: int, process: Any, pipe: connection.Connection, stack_path: Path
    ) -> None:
        self.idx = idx
        self.process = process
        self.pipe = pipe
        self.stack_path = stack_path
        self.ended = False

    def send(self, work: bytes) -> None:
        try:
            self.pipe.send_bytes(work)
        except BrokenPipeError:
            self.ended = True  # found again, and reported, when the reply is read

    def receive(self) -> _Reply:
        try:
            message = self.pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            self.ended = True
            self.process.join(1.0)
            return _Reply(self, time=0.0, died=True)
        failed_at, text, exception, result = pickle.loads(message)
        cause = _unpickle_or_none(exception) if text else None
        return _Reply(self, time=failed_at, traceback=text, exception=cause, result=result)

    def dump_stack(self) -> None:
        self.stack_path.touch()
        if self.process.is_alive() and self.stack_path.stat().st_size == 0:
            os.kill(self.process.pid, signal.SIGUSR1)


class _Reply:
    def __init__(
        self,
        rank: _Rank,
        *,
        time: float,
        died: bool = False,
        traceback: str = "",
        exception: BaseException | None = None,
        result: Any = None,
    ) -> None:
        self.rank = rank
        self.time = time
        self.died = died
        self.traceback = traceback
        self.exception = exception
        self.result = result


def _death_report(rank: _Rank, what: str) -> str:
    code = rank.process.exitcode
    how = (
        f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit {code}"
    )
    return f"the process of rank {rank.idx} ended ({how}) without a result in {what}"


def _unpickle_or_none(data: bytes) -> BaseException | None:
    try:
        return pickle.loads(data) if data else None
    except Exception:
        return None  # an exception with its own constructor may pickle and still not unpickle


def _serve(
    rank: int,
    world_size: int,
    directory: Path,
    pipe: connection.Connection,
    timeout_s: float,
) -> None:
    """A rank's process: joins the group, then runs what comes through the pipe."""
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with _stack_path(directory, rank).open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        joined = False
        while work := pipe.recv_bytes():
            if not joined:
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                # A file needs no port, and where connecting to a TCPStore now and then takes
                # seconds under load, it does not.
                store = dist.FileStore(str(directory / "store"), world_size)
                timeout = timedelta(seconds=max(timeout_s, 60.0))
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
                )
                joined = True
            pipe.send_bytes(_call(rank, world_size, work))
        faulthandler.unregister(signal.SIGUSR1)
    if joined and dist.is_initialized():
        dist.destroy_process_group()


def _stack_path(directory: Path, rank: int) -> Path:
    """Where a rank writes its stack when it is asked to."""
    return directory / f"rank{rank}.stack"


def _end_with_parent(pipe: connection.Connection) -> None:
    """Ends this process when the test process is gone, whatever the rank is busy with.

    The fork server is no help: it lives as long as a process that it has forked.
    """
    hangup = select.poll()
    hangup.register(pipe.fileno(), 0)  # no events: a hangup is always reported
    hangup.poll()
    os._exit(1)


def _call(rank: int, world_size: int, work: bytes) -> bytes:
    try:
        fn, args, environ, directory = pickle.loads(work)
        # A forked rank has the fork server's environment, not the one the test has set up.
        environ.update(
            OMP_NUM_THREADS="1",
            GLOO_SOCKET_IFNAME="lo",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
        )
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(directory)
        return pickle.dumps((time.monotonic(), "", b"", fn(rank, world_size, *args)))
    except BaseException as error:  # SystemExit and pytest's outcomes are failures of a rank too
        failed_at = time.monotonic()
        text = traceback.format_exc()
        try:
            exception = pickle.dumps(error)
        except Exception:
            exception = b""
        return pickle.dumps((failed_at, text, exception, None))
