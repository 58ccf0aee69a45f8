"""The compiled library: loading it, and calling it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftfusion_xdit.native import build
from swiftfusion_xdit.native.ops import Op, OpKind
from swiftfusion_xdit.native.program import Program
from swiftfusion_xdit.native.structs import (
    MAX_PACK_ITEMS,
    MergeArgs,
    PackArgs,
    ProgramOptions,
    PutArgs,
    binding_layout,
)
from swiftfusion_xdit.native.tensors import merge_args, merge_refusal, pack_item

_INVALID_ARGUMENT = 1


class NativeUnavailable(RuntimeError):
    """The compiled library is missing or was built from other sources."""


class NativeError(RuntimeError):
    """A call into the compiled library failed; the message names the CUDA call and its error."""


class Native:
    """The loaded library. Made by `load`."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            NativeUnavailable: the file does not load, or its structs are not those of this module.
        """
        self.path = path
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailable(f"{path} does not load: {error}; {_advice()}") from error
        self._declare()
        self._check_layout()
        self._preloaded: set[int] = set()

    def _declare(self) -> None:
        lib = self.library
        table, handles = POINTER(c_uint64), POINTER(c_void_p)
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "sf_error_string": (c_char_p, [c_int]),
            "sf_last_error": (c_char_p, []),
            "sf_source_digest": (c_char_p, []),
            "sf_layout": (c_int, [c_int, POINTER(c_char_p), table, table]),
            "sf_preload": (c_int, []),
            "sf_program_create": (
                c_int,
                [POINTER(Op), c_int, c_int, POINTER(ProgramOptions), handles],
            ),
            "sf_program_destroy": (c_int, [c_void_p]),
            "sf_program_run": (c_int, [c_void_p, c_int, c_int, table, c_int, handles, c_int]),
            "sf_merge": (c_int, [POINTER(MergeArgs), c_void_p]),
            "sf_pack": (c_int, [POINTER(PackArgs), c_void_p]),
            "sf_put": (c_int, [POINTER(PutArgs), c_void_p]),
        }
        for name, (result, arguments) in signatures.items():
            try:
                function = getattr(lib, name)
            except AttributeError as error:
                raise NativeUnavailable(f"{self.path} has no {name}; {_advice()}") from error
            function.restype, function.argtypes = result, arguments

    def layout(self) -> dict[str, tuple[int, int]]:
        """Every struct and field as C has it: name -> (offset, size) in bytes."""
        name, offset, size = c_char_p(), c_uint64(), c_uint64()
        entries: dict[str, tuple[int, int]] = {}
        index = 0
        while self.library.sf_layout(index, byref(name), byref(offset), byref(size)) == 0:
            assert name.value is not None
            entries[name.value.decode()] = (offset.value, size.value)
            index += 1
        return entries

    def _check_layout(self) -> None:
        theirs, ours = self.layout(), binding_layout()
        if theirs != ours:
            differing = sorted(x for x in theirs.keys() | ours if theirs.get(x) != ours.get(x))
            raise NativeUnavailable(
                f"{self.path} is of another version: it disagrees about {', '.join(differing)}; "
                f"{_advice()}"
            )

    def digest(self) -> str:
        """Names the sources that the library was built from."""
        return self.library.sf_source_digest().decode()

    def check(self, status: int) -> None:
        """Raise for a status other than 0."""
        if status:
            self.raise_error(status)

    def raise_error(self, status: int) -> None:
        """
        Raises:
            ValueError: the library refused an argument.
            NativeError: a CUDA call failed.
        """
        message = self.library.sf_last_error().decode(errors="replace")
        if status == _INVALID_ARGUMENT:
            raise ValueError(message)
        raise NativeError(f"{self.library.sf_error_string(status).decode()}: {message}")

    def preload(self) -> None:
        """Load the kernels on the current device, once per device.

        CUDA otherwise does so at a kernel's first launch, which may wait for the device, and the
        device may be waiting for a peer.
        """
        device = torch.cuda.current_device()
        if device not in self._preloaded:
            self.check(self.library.sf_preload())
            self._preloaded.add(device)

    def program(
        self,
        ops: Sequence[Op],
        *,
        batch_flags: bool = True,
        plane_loop: bool = False,
    ) -> Program:
        """Compile a program on the current device.

        Args:
            batch_flags: consecutive flag ops of a stream in one driver call; False for one each.
            plane_loop: one 2D copy per plane where a 3D copy would do.

        Raises:
            ValueError: an op that makes no sense; the message names it.
            NativeError: no driver, or no events.
        """
        options = ProgramOptions(flags=(0 if batch_flags else 1) | (2 if plane_loop else 0))
        events = (op.event for op in ops if op.kind in (OpKind.RECORD, OpKind.WAIT_EVENT))
        num_events = 1 + max(events, default=-1)
        handle = c_void_p()
        self.check(
            self.library.sf_program_create(
                (Op * len(ops))(*ops), len(ops), num_events, byref(options), byref(handle)
            )
        )
        assert handle.value is not None
        if torch.cuda.is_available():
            self.preload()
        return Program(self, handle.value, ops)

    def merge(
        self, partials: Sequence[tuple[Tensor, Tensor | None]], *, out: Tensor, stream: int
    ) -> Tensor:
        """Merge partial attention outputs, in fp32 and in the order given.

        Args:
            partials: 1 to 8 of (out `[B, S, H, D]` bf16, fp16 or fp32, lse `[B, H, S]` fp32
                natural log); D at most 256 and contiguous. One alone needs no lse.
            out: `[B, S, H, D]`, the partials' dtype or fp32, or any of them for fp32 partials; may
                be a peer's memory.
            stream: handle of a stream of the current device.

        Returns:
            out.

        Raises:
            ValueError: `merge_refusal` has a reason.
            NativeError: the launch failed.
        """
        reason = merge_refusal(partials, out=out)
        if reason:
            raise ValueError(f"merge: {reason}")
        args = merge_args(partials, out=out)
        status = self.library.sf_merge(byref(args), stream)
        if status:
            self.raise_error(status)
        return out

    def pack(self, pairs: Sequence[tuple[Tensor, Tensor]], *, stream: int) -> None:
        """Copy up to 16 strided tensors, each `[B, S, H, D]` with contiguous D, in one launch.

        Args:
            pairs: (source, destination) of equal shape and dtype; no destination overlaps another
                tensor. Either may be a peer's memory.
            stream: handle of a stream of the current device.

        Raises:
            ValueError: shapes, dtypes or strides that do not fit.
            NativeError: the launch failed.
        """
        if len(pairs) > MAX_PACK_ITEMS:
            raise ValueError(f"pack: at most {MAX_PACK_ITEMS} pairs, got {len(pairs)}")
        args = PackArgs(num_items=len(pairs))
        for i, (src, dst) in enumerate(pairs):
            args.items[i] = pack_item(i, src, dst)
        status = self.library.sf_pack(byref(args), stream)
        if status:
            self.raise_error(status)

    def put(self, args: PutArgs, *, stream: int) -> None:
        """Put strided blocks to up to 7 peers at once, and set flags, by one kernel.

        It waits for nothing, and takes `num_blocks` multiprocessors at most. csrc/put.cu says how a
        kernel that waits for such flags must be launched behind it.

        Args:
            args: read by this call only. The memory that it names must stay until the stream is
                past the kernel; `counters` are 0 and for this launch alone.
            stream: handle of a stream of the current device.

        Raises:
            ValueError: sizes or pointers that make no sense; the message names the item.
            NativeError: the launch failed.
        """
        status = self.library.sf_put(byref(args), stream)
        if status:
            self.raise_error(status)


def _advice() -> str:
    return f"build it with `{build.COMMAND}` (needs the CUDA toolkit's nvcc)"


@lru_cache(maxsize=1)
def load() -> Native:
    """The library, loaded once: from the package, or from the user's cache.

    Raises:
        NativeUnavailable: it is missing or stale; the message has the command that builds it.
    """
    folder = build.source_folder()
    paths = [build.PACKAGE / build.LIBRARY_NAME]
    if folder is not None:
        paths.append(build.cached_library(folder))
    refusals = []
    for path in filter(Path.is_file, paths):
        try:
            native = Native(path)
        except NativeUnavailable as error:
            refusals.append(str(error))
            continue
        if folder is None or native.digest() == build.digest(folder):
            return native
        refusals.append(f"{path} was built from other sources than {folder}; {_advice()}")
    if refusals:
        raise NativeUnavailable("; ".join(refusals))
    raise NativeUnavailable(f"the compiled part of swiftfusion_xdit is missing; {_advice()}")
