"""What one runtime state of xDiT runs on: its options, its SP group, its SequenceParallel."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftfusion_xdit import envs
from swiftfusion_xdit.xdit import groups
from swiftfusion_xdit.xdit import report as reports
from swiftfusion_xdit.xdit.key_rows import KeyRows, valid_rows
from swiftfusion_xdit.xdit.options import Options
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.report import Report

# xDiT's dense attention backends and the kernel that stands for each on a GPU. A CPU has one
# kernel, which stands for those that xDiT itself runs there.
GPU_KERNELS = {
    "SDPA": "auto",
    "SDPA_MATH": "auto",
    "SDPA_EFFICIENT": "auto",
    "SDPA_FLASH": "sdpa_flash",
    "CUDNN": "cudnn",
    "FLASH": "fa2",
    "FLASH_3": "fa3",
    "FLASH_4": "fa4",
}
CPU_BACKENDS = frozenset({"SDPA", "SDPA_MATH", "SDPA_EFFICIENT", "SDPA_FLASH"})


class Session:
    """One SP group under ``torus``. Owns a SequenceParallel per attention kernel in use.

    Closed when xDiT destroys the group, or by :func:`stop`.
    """

    def __init__(
        self, state: Any, options: Options, group: Any, report: Report | None = None
    ) -> None:
        self.report = report
        self.state = state
        self.options = options
        self.group = group
        self.rank: int = group.rank_in_group
        self.size: int = group.world_size
        self.warned: set[str] = set()
        self.key_rows: KeyRows | None = None
        self._open: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], str | None] = {}

    def kernel_for(self, backend: Any, device_type: str) -> str | None:
        """Our kernel for xDiT's backend (None: the runtime state's), or None if there is none."""
        name = (backend if backend is not None else self.state.attention_backend).name
        if device_type == "cpu":
            return "cpu" if name in CPU_BACKENDS else None
        return GPU_KERNELS.get(name)

    def only_keys(self, num_rows: int, kept: Sequence[tuple[int, int]]) -> OnlyKeys:
        """Inside, calls with ``num_rows`` local key rows use those in ``kept`` as keys.

        Args:
            kept: ranges ``(start, stop)`` of local rows, in order.
        """
        return OnlyKeys(self, KeyRows.of(num_rows, kept))

    def padded(self, num_rows: int) -> OnlyKeys:
        """Inside, a sequence of ``num_rows`` rows is padded at its end and cut into equal chunks.

        The padding stays in the queries, whose output the caller cuts off, and is no key.
        """
        chunk_rows = -(-num_rows // self.size)
        return self.only_keys(chunk_rows, [valid_rows(num_rows, self.rank, chunk_rows)])

    def cache_manager(self) -> Any:
        return sys.modules["xfuser.core.cache_manager.cache_manager"].get_cache_manager()

    def sequence_parallel(self, kernel: str) -> Any:
        """The SequenceParallel that attends with ``kernel``; made on first use, collectively."""
        if kernel not in self._open:
            from swiftfusion_xdit.sequence_parallel import SequenceParallel

            self._open[kernel] = SequenceParallel(
                self.group.device_group,
                strategy=self.options.strategy,
                machines=groups.sp_topology(self.group, self.options),
                mesh=self.options.mesh,
                schedule=self.options.schedule,
                transport=self.options.transport,
                backend=kernel,
            )
        return self._open[kernel]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
        """``[b, h, s, d]`` to ``[b, h, s, d]``, both as views of what the runtime takes."""
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        sequence_parallel = self.sequence_parallel(kernel)
        if self.report is None:
            return sequence_parallel.attention(q, k, v).transpose(1, 2)
        with self.report.torus_call(sequence_parallel):
            return sequence_parallel.attention(q, k, v).transpose(1, 2)

    def close(self) -> None:
        """Give back what is open. Not collective: a rank may do so while its peers are dead."""
        opened, self._open = self._open, {}
        for sequence_parallel in opened.values():
            if self.report is not None:
                self.report.close_torus(sequence_parallel)
            sequence_parallel.close()


class OnlyKeys:
    """Which key rows count, for the length of a model's forward pass."""

    def __init__(self, session: Session, key_rows: KeyRows) -> None:
        self.session = session
        self.key_rows = key_rows

    def __enter__(self) -> None:
        self.outer = self.session.key_rows
        self.session.key_rows = self.key_rows

    def __exit__(self, *_: object) -> None:
        self.session.key_rows = self.outer


_current: Session | None = None
_patches = Patches()


@torch.library.custom_op("swiftfusion::attention", mutates_args=())
def attention_op(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    """Distributed attention as one node of a graph: ``[b, h, s, d]`` of this rank's rows."""
    assert _current is not None, "no runtime state of xDiT runs torus"
    return _current.attend(query, key, value, kernel)


@attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    b, h, s, d = query.shape
    return query.new_empty(b, s, h, d).transpose(1, 2)


def current() -> Session | None:
    return _current


def start(state: Any, options: Options) -> None:
    """Put ``options`` in force for a runtime state, in place of what was before.

    Collective over the SP group under ``torus``.
    """
    global _current
    parallel_state = sys.modules["xfuser.core.distributed.parallel_state"]
    has_groups = parallel_state.model_parallel_is_initialized()
    group = parallel_state.get_sp_group() if has_groups else None
    if _current is not None and _current.group is group and _current.options == options:
        _current.state = state
        return
    stop()
    if group is None:
        return
    directory = envs.get("REPORT_DIR")
    report = None if directory is None else reports.start(Path(directory), group, options, _patches)
    if options.strategy == "torus":
        _current = _start_torus(state, options, group, report)


def _start_torus(state: Any, options: Options, group: Any, report: Report | None) -> Session:
    from swiftfusion_xdit.xdit import dispatch

    session = Session(state, options, group, report)
    usp = sys.modules["xfuser.model_executor.layers.usp"]
    dispatch.install(usp, session, _patches)
    groups.on_destroy(group, stop, _patches)
    return session


def stop() -> None:
    """Close the session and give USP its own code back."""
    global _current
    session, _current = _current, None
    dispatch = sys.modules.get("swiftfusion_xdit.xdit.dispatch")
    if session is not None and dispatch is not None:
        dispatch.uninstall()
    _patches.undo()
    if session is not None:
        session.close()
