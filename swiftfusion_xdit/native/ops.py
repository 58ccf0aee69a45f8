"""The entries of a stream program, and how a strided copy becomes as few of them as possible."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_uint32, c_uint64
from enum import IntEnum
from typing import ClassVar, NamedTuple

ABSOLUTE = -1  # as a base: the offset is the address


class OpKind(IntEnum):
    COPY = 0
    WRITE = 1
    WAIT = 2
    RECORD = 3
    WAIT_EVENT = 4
    CLEAR = 5
    COPY_KERNEL = 6


class Place(NamedTuple):
    """An address of a program: ``offset`` bytes into entry ``base`` of the table of each run."""

    base: int
    offset: int


class Op(ctypes.Structure):
    """One entry of a stream program (``sf_op`` in csrc/swiftfusion.h)."""

    _fields_: ClassVar = [
        ("kind", c_int32),
        ("stream", c_int32),
        ("src_base", c_int32),
        ("dst_base", c_int32),
        ("src_offset", c_uint64),
        ("dst_offset", c_uint64),
        ("width", c_uint64),
        ("height", c_uint64),
        ("depth", c_uint64),
        ("src_pitch", c_uint64),
        ("src_plane", c_uint64),
        ("dst_pitch", c_uint64),
        ("dst_plane", c_uint64),
        ("value", c_uint32),
        ("event", c_int32),
    ]

    @classmethod
    def write(cls, stream: int, flag: Place, *, value: int = 1) -> Op:
        """Set a flag, after this stream's earlier copies are visible to every GPU."""
        return cls(
            kind=OpKind.WRITE,
            stream=stream,
            src_base=ABSOLUTE,
            dst_base=flag.base,
            dst_offset=flag.offset,
            value=value,
        )

    @classmethod
    def clear(cls, stream: int, flag: Place) -> Op:
        """Set an own flag to 0, in stream order; later writes of the stream are seen after it."""
        return cls(
            kind=OpKind.CLEAR,
            stream=stream,
            src_base=ABSOLUTE,
            dst_base=flag.base,
            dst_offset=flag.offset,
        )

    @classmethod
    def wait(cls, stream: int, flag: Place, *, value: int = 1) -> Op:
        """Hold the stream until a flag has a value."""
        return cls(
            kind=OpKind.WAIT,
            stream=stream,
            dst_base=ABSOLUTE,
            src_base=flag.base,
            src_offset=flag.offset,
            value=value,
        )

    @classmethod
    def record(cls, stream: int, event: int) -> Op:
        return cls(OpKind.RECORD, stream, ABSOLUTE, ABSOLUTE, event=event)

    @classmethod
    def wait_event(cls, stream: int, event: int) -> Op:
        return cls(OpKind.WAIT_EVENT, stream, ABSOLUTE, ABSOLUTE, event=event)

    @classmethod
    def copies(
        cls,
        stream: int,
        src: Place,
        dst: Place,
        *,
        shape: Sequence[int],
        src_stride: Sequence[int],
        dst_stride: Sequence[int],
        itemsize: int,
        by_kernel: bool = False,
    ) -> list[Op]:
        """The copy of a strided array as the fewest ops: one, unless no two dims fold.

        Args:
            src, dst: where element [0, ..., 0] lies.
            shape: up to 4 dims; none, and no op, if it has no elements.
            src_stride, dst_stride: in elements, not negative.
            by_kernel: on multiprocessors, neighbours in one launch, rather than as CUDA sees fit.
        """
        dims = fold_dims(shape, src_stride, dst_stride, itemsize)
        if dims is None:
            return []
        width, outer = dims
        outer += [(1, 0, 0)] * (2 - len(outer))
        rows, planes, *blocks = outer
        op = cls(
            kind=OpKind.COPY_KERNEL if by_kernel else OpKind.COPY,
            stream=stream,
            src_base=src.base,
            dst_base=dst.base,
            width=width,
            height=rows[0],
            depth=planes[0],
            src_pitch=rows[1],
            src_plane=planes[1],
            dst_pitch=rows[2],
            dst_plane=planes[2],
        )
        starts = [(src.offset, dst.offset)]
        for count, src_step, dst_step in blocks:
            starts = [(s + i * src_step, d + i * dst_step) for i in range(count) for s, d in starts]
        return [op.moved(*start) for start in starts]

    def moved(self, src_offset: int, dst_offset: int) -> Op:
        """The same op between other offsets."""
        op = type(self).from_buffer_copy(self)
        op.src_offset, op.dst_offset = src_offset, dst_offset
        return op


def fold_dims(
    shape: Sequence[int], src_stride: Sequence[int], dst_stride: Sequence[int], itemsize: int
) -> tuple[int, list[tuple[int, int, int]]] | None:
    """(contiguous bytes, [(count, src bytes, dst bytes)] from the innermost dim), folded.

    Of more than two dims, which one copy cannot step through, the shortest come last.
    None if there are no elements.
    """
    if 0 in shape:
        return None
    dims = sorted(
        (
            (count, src * itemsize, dst * itemsize)
            for count, src, dst in zip(shape, src_stride, dst_stride, strict=True)
            if count > 1
        ),
        key=lambda dim: (dim[2], dim[1]),
    )
    width, folded = itemsize, list[tuple[int, int, int]]()
    for count, src, dst in dims:
        if not folded and src == width and dst == width:
            width *= count
        elif folded and (src, dst) == (
            folded[-1][0] * folded[-1][1],
            folded[-1][0] * folded[-1][2],
        ):
            folded[-1] = (folded[-1][0] * count, *folded[-1][1:])
        else:
            folded.append((count, src, dst))
    if len(folded) > 2:
        folded.sort(key=lambda dim: dim[0], reverse=True)
        folded[:2] = sorted(folded[:2], key=lambda dim: (dim[2], dim[1]))
    return width, folded
