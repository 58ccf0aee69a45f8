"""The few CUDA calls that order and move data on a stream without a kernel.

Flags are written and awaited by the stream itself (``cuStreamWriteValue32``,
``cuStreamWaitValue32``; CUDA driver API, "Stream Memory Operations"), data moves by
``cudaMemcpyAsync`` and ``cudaMemcpy2DAsync``, which copy engines carry out. All can be captured
in a CUDA graph. The libraries are those that torch has loaded: nothing is compiled for this.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

_WAIT_EQ = 0x1
_NO_MEMORY_BARRIER = 0
_MEMCPY_DEFAULT = 4  # the addresses say where they are


@dataclass(frozen=True)
class CopyShape:
    """A strided copy as ``len(starts)`` two-dimensional copies; everything in bytes.

    Each copies ``height`` rows of ``width`` bytes, and begins at ``(src, dst)`` of ``starts``.
    """

    width: int
    height: int
    src_pitch: int
    dst_pitch: int
    starts: tuple[tuple[int, int], ...]


@lru_cache(maxsize=4096)
def copy_shape(
    shape: tuple[int, ...],
    src_stride: tuple[int, ...],
    dst_stride: tuple[int, ...],
    itemsize: int,
) -> CopyShape:
    """Cut a strided copy (strides in elements) into as few two-dimensional ones as it takes."""
    if 0 in shape:
        return CopyShape(0, 0, 0, 0, ())
    dims = _collapse(shape, src_stride, dst_stride)
    width = itemsize
    if dims and dims[-1][1:] == (1, 1):
        width *= dims.pop()[0]
    # Of the dims that are left, the longest becomes the rows of one call. A pitch below the width
    # (rows that overlap, as in an expanded tensor) is not something a 2-D copy can do.
    candidates = [d for d in dims if min(d[1], d[2]) * itemsize >= width]
    height, src_step, dst_step = max(candidates, default=(1, 0, 0))
    if candidates:
        dims.remove((height, src_step, dst_step))
    starts = [
        (
            sum(i * dim[1] for i, dim in zip(index, dims, strict=True)) * itemsize,
            sum(i * dim[2] for i, dim in zip(index, dims, strict=True)) * itemsize,
        )
        for index in itertools.product(*(range(dim[0]) for dim in dims))
    ]
    return CopyShape(width, height, src_step * itemsize, dst_step * itemsize, tuple(starts))


def _collapse(
    shape: tuple[int, ...], src_stride: tuple[int, ...], dst_stride: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """(length, source step, destination step) of every dim, outer first, neighbours joined."""
    dims: list[tuple[int, int, int]] = []
    for length, src_step, dst_step in zip(shape, src_stride, dst_stride, strict=True):
        if length == 1:
            continue
        if dims and dims[-1][1:] == (length * src_step, length * dst_step):
            dims[-1] = (dims[-1][0] * length, src_step, dst_step)
        else:
            dims.append((length, src_step, dst_step))
    return dims


class Driver:
    """Bound CUDA entry points; every call's status is checked. ``stream`` is a raw handle.

    Raises:
        OSError: a library is missing.
        RuntimeError: from any call, naming it and CUDA's reason.
    """

    def __init__(self) -> None:
        version = torch.version.cuda
        if version is None:
            raise OSError("torch has no CUDA support")
        self._cuda = ctypes.CDLL("libcuda.so.1")
        # By its soname this is the runtime that torch itself has loaded.
        self._runtime = ctypes.CDLL(f"libcudart.so.{version.split('.')[0]}")
        pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
        word = (pointer, ctypes.c_uint64, ctypes.c_uint32, flags)
        self._write32 = self._bind(self._cuda, "cuStreamWriteValue32_v2", word)
        self._wait32 = self._bind(self._cuda, "cuStreamWaitValue32_v2", word)
        self._memcpy = self._bind(
            self._runtime, "cudaMemcpyAsync", (pointer, pointer, size, ctypes.c_int, pointer)
        )
        self._memcpy2d = self._bind(
            self._runtime,
            "cudaMemcpy2DAsync",
            (pointer, size, pointer, size, size, size, ctypes.c_int, pointer),
        )
        self._error_string = self._runtime.cudaGetErrorString
        self._error_string.restype = ctypes.c_char_p

    @staticmethod
    def _bind(library: ctypes.CDLL, name: str, argtypes: tuple) -> Callable[..., int]:
        function = getattr(library, name)
        function.argtypes = argtypes
        function.restype = ctypes.c_int
        return function

    def write32(self, stream: int, address: int, value: int) -> None:
        """Write a word once everything before it on the stream is done and visible to all."""
        self._check("cuStreamWriteValue32", self._write32(stream, address, value, 0))

    def note32(self, stream: int, address: int, value: int) -> None:
        """Write a word in stream order that orders no other memory."""
        code = self._write32(stream, address, value, _NO_MEMORY_BARRIER)
        self._check("cuStreamWriteValue32", code)

    def wait32(self, stream: int, address: int, value: int) -> None:
        """Hold the stream until the word has this value."""
        self._check("cuStreamWaitValue32", self._wait32(stream, address, value, _WAIT_EQ))

    def copy(self, stream: int, dst: int, src: int, shape: CopyShape) -> None:
        """Enqueue a strided copy between two addresses, of any devices or the host."""
        for src_start, dst_start in shape.starts:
            if shape.height == 1:
                code = self._memcpy(
                    dst + dst_start, src + src_start, shape.width, _MEMCPY_DEFAULT, stream
                )
                self._check("cudaMemcpyAsync", code)
            else:
                code = self._memcpy2d(
                    dst + dst_start,
                    shape.dst_pitch,
                    src + src_start,
                    shape.src_pitch,
                    shape.width,
                    shape.height,
                    _MEMCPY_DEFAULT,
                    stream,
                )
                self._check("cudaMemcpy2DAsync", code)

    def _check(self, call: str, code: int) -> None:
        if code:
            # Driver and runtime number their errors alike, apart from a few old ones.
            reason = self._error_string(code).decode()
            raise RuntimeError(f"{call} failed: {reason} (code {code})")


@lru_cache(maxsize=1)
def load() -> Driver:
    """The driver of this process."""
    return Driver()


def visible_devices() -> Iterator[tuple[int, tuple[int, int]]]:
    """(index, identity) of the GPUs that this process sees; the identity is the same for all."""
    for index in range(torch.cuda.device_count()):
        yield index, device_identity(index)


def device_identity(index: int) -> tuple[int, int]:
    """The UUID of a GPU as two int64."""
    text = str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-").replace("-", "")
    raw = bytes.fromhex(text)
    return (
        int.from_bytes(raw[:8], "big", signed=True),
        int.from_bytes(raw[8:], "big", signed=True),
    )
