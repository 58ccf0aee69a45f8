"""How the nvshmem transport starts and ends the library, over stand-ins for its bindings."""

from __future__ import annotations

import atexit
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import nvshmem
from tests.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[1]
DEVICE = 1
UNIQUE_ID = np.dtype([("version", np.int32), ("internal", np.int8, (124,))], align=True)


class FakeDevice:
    def __init__(self, index: int) -> None:
        assert index == DEVICE

    def set_current(self) -> None:
        pass


class FakeCore(ModuleType):
    """``nvshmem.core``: notes what it starts with, and on which device it ends."""

    def __init__(self) -> None:
        super().__init__("nvshmem.core")
        self.device_of_thread: dict[int, object] = {}
        self.given: dict[str, Any] = {}

    def get_version(self) -> SimpleNamespace:
        return SimpleNamespace(libnvshmem_version="3.4.5", nvshmem4py_version="0.4.1")

    def get_unique_id(self, empty: bool = False) -> SimpleNamespace:
        data = np.full(UNIQUE_ID.itemsize, 7 if empty else 42, dtype=np.int8)
        return SimpleNamespace(_data=data.view(UNIQUE_ID).view(np.recarray))

    def init(self, **given: Any) -> None:
        self.given = given

    def finalize(self) -> None:
        device = self.device_of_thread.get(threading.get_ident(), 0)
        print(f"finalised on device {device}", flush=True)


def initialize() -> FakeCore:
    """Initialise the stand-in as on a machine whose GPU for this rank is ``DEVICE``."""
    core, package, bindings = FakeCore(), ModuleType("nvshmem"), ModuleType("nvshmem.bindings")
    bindings.init_status = lambda: 0  # type: ignore[attr-defined]
    package.core, package.bindings = core, bindings  # type: ignore[attr-defined]
    cuda_core = ModuleType("cuda.core")
    cuda_core.Device = FakeDevice  # type: ignore[attr-defined]
    modules = (package, bindings, core, ModuleType("cuda"), cuda_core)
    sys.modules.update({module.__name__: module for module in modules})
    torch.cuda.current_device = lambda: DEVICE
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.set_device = lambda device: core.device_of_thread.update(
        {threading.get_ident(): device}
    )
    assert nvshmem.initialize() is bindings
    return core


def start(rank: int, world_size: int) -> None:
    given = initialize().given
    assert (given["rank"], given["nranks"], given["initializer_method"]) == (
        rank,
        world_size,
        "uid",
    )
    unique_id = given["uid"]._data.tobytes()
    assert unique_id == bytes([42] * UNIQUE_ID.itemsize), f"rank {rank} has {unique_id!r}"


def test_every_rank_starts_with_the_unique_id_of_rank_0() -> None:
    run_ranks(2, start)


def start_and_end() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize()
    dist.destroy_process_group()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    # Runs before what was registered earlier; some releases of Python refuse by themselves.
    atexit.register(setattr, threading.Thread, "start", refuse)


def test_the_end_of_a_process_finalises_on_its_device_and_starts_no_thread() -> None:
    command = "from tests.test_comm_nvshmem import start_and_end; start_and_end()"
    ended = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    shown = f"{ended.stdout}\n{ended.stderr}"
    assert ended.returncode == 0 and "RuntimeError" not in ended.stderr, shown
    assert ended.stdout.splitlines() == [f"finalised on device {DEVICE}"], shown
