"""What one runtime state of xDiT runs on: its options, its SP group, its SequenceParallel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swiftfusion_xdit import envs
from swiftfusion_xdit.attention import Backend, MaskedBackend
from swiftfusion_xdit.xdit import groups
from swiftfusion_xdit.xdit import report as reports
from swiftfusion_xdit.xdit.kernels import GatherBackend, XditBackend
from swiftfusion_xdit.xdit.key_masks import KeyMasks
from swiftfusion_xdit.xdit.key_rows import KeyRows, valid_rows
from swiftfusion_xdit.xdit.options import Options
from swiftfusion_xdit.xdit.patch_cache import PatchCache
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
# Kernels that are no local kernel of this package's own: xDiT's function of a backend by name,
# attention under a mask, and one that only collects its rows.
OPAQUE = "xdit:"
MASKED = "masked"
GATHER = "gather"


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
        self.key_masks = KeyMasks()
        self.patch_cache = PatchCache()
        self._open: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], str | None] = {}

    def kernel_for(self, backend: Any, device_type: str) -> str | None:
        """Our kernel for xDiT's backend (None: the runtime state's), or None if there is none."""
        name = (backend if backend is not None else self.state.attention_backend).name
        if device_type == "cpu" and name in CPU_BACKENDS:
            return "cpu"
        if name in GPU_KERNELS:
            return GPU_KERNELS[name] if device_type != "cpu" else None
        return f"{OPAQUE}{name}" if self._xdit_function(name) is not None else None

    def _xdit_function(self, name: str) -> Callable[..., Any] | None:
        """xDiT's own attention function of a backend."""
        module = sys.modules["xfuser.core.distributed.attention_backend"]
        backend = getattr(module.AttentionBackendType, name, None)
        return module.ATTENTION_FUNCTION_REGISTRY.get(backend)

    def only_keys(
        self, num_rows: int, kept: Sequence[tuple[int, int]], *, total: Sequence[int] = ()
    ) -> OnlyKeys:
        """Inside, calls with ``num_rows`` local key rows use those in ``kept`` as keys.

        Args:
            kept: ranges ``(start, stop)`` of local rows, in order.
            total: numbers that every rank has alike and that the kept rows of all follow from.
        """
        return OnlyKeys(self, KeyRows.of(num_rows, kept, total=total))

    def padded(self, num_rows: int) -> OnlyKeys:
        """Inside, a sequence of ``num_rows`` rows is padded at its end and cut into equal chunks.

        The padding stays in the queries, whose output the caller cuts off, and is no key.
        """
        chunk_rows = -(-num_rows // self.size)
        kept = [valid_rows(num_rows, self.rank, chunk_rows)]
        return self.only_keys(chunk_rows, kept, total=[num_rows])

    def has_patch_cache(self, attn_layer: Any) -> bool:
        """Whether PipeFusion keeps keys and values of this attention layer."""
        manager = sys.modules["xfuser.core.cache_manager.cache_manager"].get_cache_manager()
        return attn_layer is not None and manager.has_cache_entry(attn_layer)

    def sequence_parallel(self, kernel: str) -> Any:
        """The SequenceParallel that attends with ``kernel``; made on first use, collectively.

        Raises:
            NotImplementedError: the kernel must see whole sequences, and a forced mesh or schedule
                would split them.
        """
        if kernel not in self._open:
            from swiftfusion_xdit.sequence_parallel import SequenceParallel

            backend = self._backend(kernel)
            if isinstance(backend, Backend) and (conflict := self.options.split_sequence):
                raise NotImplementedError(f"{self.options.flag} does not support {conflict}")
            self._open[kernel] = SequenceParallel(
                self.group.device_group,
                strategy=self.options.strategy,
                machines=groups.sp_topology(self.group, self.options),
                mesh=self.options.mesh,
                schedule=self.options.schedule,
                wire=self.options.wire,
                transport=self.options.transport,
                backend=backend,
            )
        return self._open[kernel]

    def _backend(self, kernel: str) -> str | Backend:
        device = self.group.device
        if kernel == MASKED:
            return MaskedBackend(device)
        if kernel == GATHER:
            return GatherBackend(device)
        if kernel.startswith(OPAQUE):
            function = self._xdit_function(kernel[len(OPAQUE) :])
            assert function is not None, kernel
            return XditBackend(kernel[len(OPAQUE) :], function, device)
        return kernel

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


def current() -> Session | None:
    return _current


def start(state: Any, options: Options) -> None:
    """Put ``options`` in force for a runtime state, in place of what was before.

    Collective over the SP group under ``torus``.
    """
    global _current
    options = options.with_fp8_comms(state)
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
