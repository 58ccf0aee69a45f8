"""The structs of csrc/swiftfusion.h."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from typing import ClassVar

from swiftfusion_xdit.native.ops import Op

MAX_PARTIALS = 8
MAX_HEAD_DIM = 256
MAX_PACK_ITEMS = 16
MAX_PUT_ITEMS = 16
MAX_PUT_PEERS = 7


class ProgramOptions(ctypes.Structure):
    """``sf_program_options``."""

    _fields_: ClassVar = [
        ("flags", c_uint32),
        ("reserved", c_uint32),
    ]


class MergeArgs(ctypes.Structure):
    """``sf_merge_args``."""

    _fields_: ClassVar = [
        ("out", c_void_p * MAX_PARTIALS),
        ("out_stride", c_int64 * 3 * MAX_PARTIALS),
        ("lse", c_void_p * MAX_PARTIALS),
        ("lse_stride", c_int64 * 3 * MAX_PARTIALS),
        ("dst", c_void_p),
        ("dst_stride", c_int64 * 3),
        ("num_partials", c_int32),
        ("batch", c_int32),
        ("rows", c_int32),
        ("heads", c_int32),
        ("head_dim", c_int32),
        ("in_dtype", c_int32),
        ("dst_dtype", c_int32),
    ]


class PackItem(ctypes.Structure):
    """``sf_pack_item``."""

    _fields_: ClassVar = [
        ("src", c_void_p),
        ("dst", c_void_p),
        ("src_stride", c_int64 * 3),
        ("dst_stride", c_int64 * 3),
        ("batch", c_int32),
        ("rows", c_int32),
        ("heads", c_int32),
        ("head_bytes", c_int32),
    ]


class PackArgs(ctypes.Structure):
    """``sf_pack_args``."""

    _fields_: ClassVar = [
        ("items", PackItem * MAX_PACK_ITEMS),
        ("num_items", c_int32),
        ("reserved", c_int32),
    ]


class PutItem(ctypes.Structure):
    """``sf_put_item``."""

    _fields_: ClassVar = [
        ("src", c_void_p),
        ("dst", c_void_p * MAX_PUT_PEERS),
        ("flag", c_void_p * MAX_PUT_PEERS),
        ("src_stride", c_int64 * 3),
        ("dst_stride", c_int64 * 3),
        ("batch", c_int32),
        ("rows", c_int32),
        ("heads", c_int32),
        ("head_bytes", c_int32),
    ]


class PutArgs(ctypes.Structure):
    """``sf_put_args``."""

    _fields_: ClassVar = [
        ("items", PutItem * MAX_PUT_ITEMS),
        ("counters", c_void_p),
        ("num_items", c_int32),
        ("num_peers", c_int32),
        ("num_blocks", c_int32),
        ("reserved", c_int32),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "sf_op": Op,
    "sf_program_options": ProgramOptions,
    "sf_merge_args": MergeArgs,
    "sf_pack_item": PackItem,
    "sf_pack_args": PackArgs,
    "sf_put_item": PutItem,
    "sf_put_args": PutArgs,
}


def binding_layout() -> dict[str, tuple[int, int]]:
    """Every struct and field as this module has it: name -> (offset, size) in bytes."""
    entries: dict[str, tuple[int, int]] = {}
    for name, struct in STRUCTS.items():
        entries[name] = (0, ctypes.sizeof(struct))
        for field in struct._fields_:
            descriptor = getattr(struct, field[0])
            entries[f"{name}.{field[0]}"] = (descriptor.offset, descriptor.size)
    return entries
