"""The compiled part, csrc/, as Python sees it: stream programs, merge, pack and put.

A plain C interface through ctypes, so that one library serves every torch and every Python. It
loads also where there is no GPU and no driver.
"""

from swiftfusion_xdit.native.library import Native, NativeError, NativeUnavailable, load
from swiftfusion_xdit.native.ops import ABSOLUTE, Op, OpKind, Place
from swiftfusion_xdit.native.program import Program
from swiftfusion_xdit.native.structs import PutArgs, PutItem
from swiftfusion_xdit.native.tensors import merge_refusal

__all__ = [
    "ABSOLUTE",
    "Native",
    "NativeError",
    "NativeUnavailable",
    "Op",
    "OpKind",
    "Place",
    "Program",
    "PutArgs",
    "PutItem",
    "load",
    "merge_refusal",
]
