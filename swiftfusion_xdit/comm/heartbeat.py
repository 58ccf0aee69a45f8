"""What a GPU notes about its layers in host memory, for the watchdog to read.

The notes are written by the streams themselves, as constants, so a captured CUDA graph makes them
on every replay; the host makes one around kernels that it tries. Nothing here synchronises with the
device.

| note | written | means |
|---|---|---|
| in flight | 1 when a layer begins, 0 when it has ended | the device is inside a layer |
| beat | 1 when a layer begins; the host clears it | a layer has begun since |
| lane | a token before a wait, 0 after it | the flag that this stream waits for |

A lane belongs to one stream that waits in calls of the communicator. A compiled program notes none
of its waits, which would cost it two operations each: of those, every flag that is not set may be
the one. A kernel that waits itself notes a flag for which it has waited too long.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from swiftfusion_xdit.comm import driver
from swiftfusion_xdit.comm.base import Flag
from swiftfusion_xdit.comm.driver import CopyShape
from swiftfusion_xdit.comm.watchdog import PendingWait

NUM_LANES = 16
FLAG_BITS = 20  # of a token; the buffer's number is above
MAX_BUFFERS = (1 << 32 - FLAG_BITS) - 1
READ_TIMEOUT_S = 2.0

_LANE_OFFSET = 64


class FlagMemory(Protocol):
    """A buffer whose flags can be read back. ``flag_names`` gives the waiter's flag and peer."""

    number: int
    num_flags: int
    flag_stride: int
    flag_names: dict[int, tuple[Flag, int]]

    def flag_base(self) -> int:
        """Address of this rank's first flag; 0 if the buffer is closed."""


def wait_token(buffer_number: int, flag_index: int) -> int:
    """What a lane holds while its stream waits for a flag of a buffer; never 0."""
    assert 0 < buffer_number <= MAX_BUFFERS, f"buffer {buffer_number}"
    assert 0 <= flag_index < 1 << FLAG_BITS, f"flag {flag_index}"
    return buffer_number << FLAG_BITS | flag_index


class Heartbeat:
    """The notes of one communicator: how streams write them, and how the watchdog reads them.

    ``buffers`` gives the communicator's buffers at the time of the call.
    """

    def __init__(self, device: torch.device, buffers: Callable[[], Sequence[FlagMemory]]) -> None:
        self._device = device
        self._driver = driver.load()
        self._buffers = buffers
        num_bytes = _LANE_OFFSET + 4 * NUM_LANES
        self._notes = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._address = self._notes.data_ptr()
        self._in_flight = ctypes.c_uint32.from_address(self._address)
        self._beat = ctypes.c_uint32.from_address(self._address + 4)
        self._lanes = (ctypes.c_uint32 * NUM_LANES).from_address(self._address + _LANE_OFFSET)
        self._lane_of: dict[int, int] = {}
        self._reader = _FlagReader(device)

    def begin_notes(self) -> list[tuple[int, int]]:
        """(address, value) of the words to write, in order, when a layer begins."""
        return [(self._address, 1), (self._address + 4, 1)]

    def end_notes(self) -> list[tuple[int, int]]:
        """The same for when it has ended."""
        return [(self._address, 0)]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the host waits for the device outside of a layer: that counts as one."""
        self._in_flight.value = self._beat.value = 1
        try:
            yield
        finally:
            self._in_flight.value = 0

    def stream_lane_address(self, stream: int) -> int:
        """Where a stream notes what it waits for: an aligned uint32."""
        lane = self._lane_of.get(stream)
        if lane is None:
            lane = self._lane_of[stream] = len(self._lane_of) % NUM_LANES
        return self._address + _LANE_OFFSET + 4 * lane

    def take_beat(self) -> bool:
        beat = bool(self._beat.value)
        self._beat.value = 0
        return beat

    def in_flight(self) -> bool:
        return bool(self._in_flight.value)

    def pending(self) -> list[PendingWait]:
        tokens = sorted({token for token in self._lanes if token})
        buffers = {buffer.number: buffer for buffer in self._buffers()}
        values = {number: self._reader.read(buffer) for number, buffer in buffers.items()}
        waits = []
        for token in tokens:
            number, index = token >> FLAG_BITS, token & ((1 << FLAG_BITS) - 1)
            if number in buffers:
                wait = _pending_wait(buffers[number], index, values[number], certain=True)
                if wait is not None and wait.seen != 1:
                    waits.append(wait)
        if tokens:
            return waits
        # Nothing notes its waits here: every flag that is not set may be the one.
        for number, buffer in buffers.items():
            for index in sorted(buffer.flag_names):
                wait = _pending_wait(buffer, index, values[number], certain=False)
                if wait is not None and wait.seen == 0:
                    waits.append(wait)
        return waits


def _pending_wait(
    buffer: FlagMemory, index: int, values: list[int] | None, *, certain: bool
) -> PendingWait | None:
    named = buffer.flag_names.get(index)
    if named is None:
        return None
    seen = values[index] if values is not None and index < len(values) else None
    return PendingWait(named[0].name, index, named[1], seen, certain=certain)


class _FlagReader:
    """Reads flags while other streams of the device stand still.

    What it needs is made beforehand: allocating may wait for the device.
    """

    MAX_FLAGS = 1 << 14

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver = driver.load()
        self._stream = torch.cuda.Stream(device)  # does not wait for the default stream
        self._values = torch.zeros(self.MAX_FLAGS, dtype=torch.int32, pin_memory=True)
        self._lock = threading.Lock()

    def read(self, buffer: FlagMemory) -> list[int] | None:
        """This rank's flags, or None if the device does not answer."""
        base, num_flags = buffer.flag_base(), min(buffer.num_flags, self.MAX_FLAGS)
        if not base or not num_flags:
            return None
        shape = CopyShape(4, num_flags, buffer.flag_stride, 4, ((0, 0),))
        with self._lock:
            try:
                torch.cuda.set_device(self._device)  # of this thread
                handle = self._stream.cuda_stream
                self._driver.copy(handle, self._values.data_ptr(), base, shape)
                deadline = time.monotonic() + READ_TIMEOUT_S
                while not self._stream.query():
                    if time.monotonic() > deadline:
                        return None
                    time.sleep(1e-3)
            except RuntimeError:  # a device that failed reports nothing
                return None
            return self._values[:num_flags].tolist()
