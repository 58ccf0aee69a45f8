"""A compiled stream program: what is enqueued between two attention calls, in one C call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ctypes import c_uint64, c_void_p
from typing import TYPE_CHECKING

from swiftfusion_xdit.native.ops import Op

if TYPE_CHECKING:
    from swiftfusion_xdit.native.library import Native


class Program:
    """A compiled program; made by `Native.program`. One thread at a time may run it."""

    def __init__(self, native: Native, handle: int, ops: Sequence[Op]) -> None:
        self.num_ops = len(ops)
        self.num_bases = 1 + max((max(op.src_base, op.dst_base) for op in ops), default=-1)
        self.num_streams = 1 + max((op.stream for op in ops), default=-1)
        self._native = native
        self._handle: int | None = handle
        self._bases = (c_uint64 * self.num_bases)()
        self._streams = (c_void_p * self.num_streams)()
        self._run = native.library.sf_program_run

    def bind(self, bases: Sequence[int], streams: Sequence[int]) -> None:
        """Set the tables that `run` uses: addresses, and stream handles (``stream.cuda_stream``).

        Raises:
            ValueError: the lengths are not ``num_bases`` and ``num_streams``.
        """
        self._bases[:] = list(bases)
        self._streams[:] = list(streams)

    def set_base(self, index: int, address: int) -> None:
        """Set one address of the table that `bind` sets."""
        self._bases[index] = address

    def run(
        self,
        begin: int = 0,
        end: int | None = None,
        bases: Sequence[int] | None = None,
        streams: Sequence[int] | None = None,
    ) -> None:
        """Enqueue ops [begin, end) and return at once; all streams belong to the current device.

        Args:
            bases, streams: as in `bind`, which need not be repeated for each part of a layer.

        Raises:
            NativeError: a CUDA call failed; the message names the op.
        """
        if bases is not None:
            self._bases[:] = list(bases)
        if streams is not None:
            self._streams[:] = list(streams)
        # ctypes releases the GIL: a full stream blocks the call until the GPU goes on, and the
        # watchdog must run meanwhile.
        status = self._run(
            self._handle,
            begin,
            self.num_ops if end is None else end,
            self._bases,
            self.num_bases,
            self._streams,
            self.num_streams,
        )
        if status:
            self._native.raise_error(status)

    def close(self) -> None:
        """Destroy the events. What is enqueued or captured stays valid; may be called twice."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._native.check(self._native.library.sf_program_destroy(handle))

    def __del__(self) -> None:
        # At interpreter exit CUDA may be gone; its events are gone with it then.
        if getattr(self, "_handle", None) is not None and not sys.is_finalizing():
            self.close()
