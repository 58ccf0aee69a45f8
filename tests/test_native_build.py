"""csrc/ compiles, loads without a driver, agrees with its binding, and says what is wrong.

Nothing here needs a GPU; what the kernels and programs compute is tested under tests/gpu.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swiftfusion_xdit.native import ABSOLUTE, Native, NativeError, Op, Place, build
from swiftfusion_xdit.native.structs import (
    MAX_PARTIALS,
    MergeArgs,
    PackArgs,
    PutArgs,
    PutItem,
    binding_layout,
)

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="nvcc is not installed")
FLAG = Place(ABSOLUTE, 64)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(build.build(tmp_path_factory.mktemp("native") / "native.so"))


@needs_nvcc
def test_structs_agree(native: Native) -> None:
    assert native.layout() == binding_layout()


@needs_nvcc
def test_digest_is_that_of_the_sources(native: Native) -> None:
    folder = build.source_folder()
    assert folder is not None
    assert native.digest() == build.digest(folder)


@needs_nvcc
def test_every_status_has_a_text(native: Native) -> None:
    texts = [native.library.sf_error_string(status).decode() for status in range(5)]
    assert texts[0] == "success" and texts[-1] == "unknown status"
    assert len(set(texts)) == len(texts)


@needs_nvcc
@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([Op(kind=9)], r"op 0 \(unknown, stream 0\): kind must be 0 to 6, got 9"),
        ([Op.write(-1, FLAG)], r"op 0 \(write, stream -1\): stream must be >= 0"),
        ([Op.write(0, Place(-2, 0))], "dst_base must be >= -1, got -1 and -2"),
        ([Op.wait(0, FLAG, value=0)], "wait needs a value other than 0"),
        ([Op.record(0, 0), Op.wait_event(1, 1)], "op 1 waits for event 1, which no earlier op"),
        ([Op.record(0, -1)], r"op 0 \(record, stream 0\): event must be 0"),
        ([Op(width=1 << 40, height=1 << 40, depth=1)], "must fit in 64 bits"),
    ],
)
def test_a_wrong_program_is_refused(native: Native, ops: list[Op], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.program(ops)


@needs_nvcc
def test_a_program_that_does_nothing_runs_without_a_driver(native: Native) -> None:
    # Copies of no bytes: the tables are checked, and no CUDA call is made.
    program = native.program([Op(stream=1, src_base=0, dst_base=2)] * 3)
    assert (program.num_ops, program.num_bases, program.num_streams) == (3, 3, 2)
    program.run(0, 3, [16, 32, 48], [0, 0])
    program.run(1)
    with pytest.raises(ValueError, match="ops must lie in 0 to 3, got begin=2 end=4"):
        program.run(2, 4)
    with pytest.raises(ValueError, match="ops must lie in 0 to 3, got begin=2 end=1"):
        program.run(2, 1)
    with pytest.raises(ValueError):
        program.bind([16], [0, 0])
    run, table = native.library.sf_program_run, (ctypes.c_uint64 * 3)()
    status = run(program._handle, 0, 3, table, 2, (ctypes.c_void_p * 2)(), 2)
    with pytest.raises(ValueError, match="needs 3 bases and 2 streams, got 2 and 2"):
        native.check(status)
    program.close()
    program.close()


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_the_failing_call_is_named(native: Native) -> None:
    with pytest.raises(NativeError, match="a CUDA call failed: cuStreamBatchMemOp: "):
        native.program([Op.write(0, FLAG)])
    with pytest.raises(NativeError, match="a CUDA call failed: cudaEventCreateWithFlags: "):
        native.program([Op.record(0, 0)])


def merge_args(**changes: int) -> MergeArgs:
    values = {"num_partials": 2, "batch": 1, "rows": 4, "heads": 2, "head_dim": 64, **changes}
    return MergeArgs(**values)


@needs_nvcc
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_partials": 0}, f"num_partials must be 1 to {MAX_PARTIALS}, got 0"),
        ({"num_partials": 9}, f"num_partials must be 1 to {MAX_PARTIALS}, got 9"),
        ({"batch": 65536}, "batch must be 0 to 65535"),
        ({"rows": 1 << 30}, "got batch=1 rows=1073741824 heads=2"),
        ({"heads": -1}, "heads=-1"),
        ({"head_dim": 257}, "head_dim must be 1 to 256, got 257"),
        ({"in_dtype": 0, "dst_dtype": 1}, "got in 0 and dst 1"),
        ({"in_dtype": 3}, "got in 3 and dst 0"),
        ({}, "is NULL"),
    ],
)
def test_wrong_merge_arguments_are_refused(
    native: Native, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        native.check(native.library.sf_merge(ctypes.byref(merge_args(**changes)), None))


@needs_nvcc
def test_wrong_pack_arguments_are_refused(native: Native) -> None:
    args = PackArgs(num_items=17)
    with pytest.raises(ValueError, match="num_items must be 0 to 16, got 17"):
        native.check(native.library.sf_pack(ctypes.byref(args), None))
    args = PackArgs(num_items=1)
    args.items[0].rows = -3
    with pytest.raises(ValueError, match="item 0 has a negative size: batch=0 rows=-3"):
        native.check(native.library.sf_pack(ctypes.byref(args), None))
    args.items[0].batch = args.items[0].rows = args.items[0].heads = args.items[0].head_bytes = 4
    with pytest.raises(ValueError, match="src or dst of item 0 is NULL"):
        native.check(native.library.sf_pack(ctypes.byref(args), None))


def put_args(item: dict[str, object] | None = None, **changes: int) -> PutArgs:
    """Arguments of `sf_put` with a nonempty item 1, valid but for what is named."""
    fields: dict[str, object] = {
        "src": 64,
        "dst": (64,) * 3,
        "batch": 1,
        "rows": 1,
        "heads": 1,
        "head_bytes": 16,
        **(item or {}),
    }
    args = PutArgs(**{"num_items": 2, "num_peers": 3, "num_blocks": 4, "counters": 64, **changes})
    args.items[1] = PutItem(**fields)
    return args


@needs_nvcc
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (put_args(num_items=17), "num_items must be 0 to 16, got 17"),
        (put_args(num_items=-1), "num_items must be 0 to 16, got -1"),
        (put_args(num_peers=0), "num_peers must be 1 to 7, got 0"),
        (put_args(num_peers=8), "num_peers must be 1 to 7, got 8"),
        (put_args(num_blocks=0), "num_blocks must be 1 to 1024, got 0"),
        (put_args(num_blocks=1025), "num_blocks must be 1 to 1024, got 1025"),
        (put_args({"rows": -3}), "item 1 has a negative size: batch=1 rows=-3 heads=1"),
        (put_args({"src": None}), "src of item 1 is NULL"),
        (put_args({"dst": (64, 64)}), r"dst\[2\] of item 1 is NULL"),
        (
            put_args({"flag": (64, 0, 64)}),
            "item 1 must have a flag at each of its 3 peers or at none, got 2",
        ),
        # The fourth peer does not count.
        (put_args({"flag": (0, 0, 64, 64)}), "its 3 peers or at none, got 1"),
        (put_args({"flag": (64,) * 3}, counters=0), "item 1 has flags, but counters is NULL"),
        (
            put_args({"rows": 0, "flag": (64,) * 3}, counters=0),
            "item 1 has flags, but counters is NULL",
        ),
        (
            put_args({"rows": 1 << 16, "heads": 1 << 16, "src": 65}),
            "item 1 must have at most 2147483647 units of 1 bytes, got 68719476736",
        ),
    ],
)
def test_wrong_put_arguments_are_refused(native: Native, args: PutArgs, message: str) -> None:
    with pytest.raises(ValueError, match=f"^sf_put: .*{message}"):
        native.put(args, stream=0)


@needs_nvcc
def test_nothing_to_do_needs_no_driver(native: Native) -> None:
    assert native.library.sf_merge(ctypes.byref(merge_args(rows=0)), None) == 0
    assert native.library.sf_pack(ctypes.byref(PackArgs(num_items=0)), None) == 0
    assert native.library.sf_pack(ctypes.byref(PackArgs(num_items=2)), None) == 0
    native.put(put_args(num_items=0), stream=0)
    native.put(put_args({"heads": 0, "src": None}, counters=0), stream=0)


@needs_nvcc
def test_what_nvcc_says_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "swiftfusion.h").write_text("#error the test's own mistake\n")
    (sources / "wrong.cpp").write_text('#include "swiftfusion.h"\n')
    monkeypatch.setattr(build, "SOURCE_FOLDERS", (sources,))
    output = tmp_path / "native.so"
    with pytest.raises(build.BuildError, match="the test's own mistake"):
        build.build(output)
    assert not output.exists()


def test_without_nvcc_the_build_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(build.BuildError, match="nvcc not found"):
        build.build()


def strided(shape: tuple[int, ...], order: tuple[int, ...], gap: int) -> tuple[int, ...]:
    """Strides of a tensor laid out in `order`, innermost last, with `gap` elements after each."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim] + gap
    return tuple(strides)


def bytes_moved(op: Op) -> list[tuple[int, int]]:
    """(source, destination) of every byte that a copy moves."""
    steps = itertools.product(range(op.depth), range(op.height), range(op.width))
    return [
        (
            op.src_offset + z * op.src_plane + y * op.src_pitch + x,
            op.dst_offset + z * op.dst_plane + y * op.dst_pitch + x,
        )
        for z, y, x in steps
    ]


@given(
    shape=st.tuples(*[st.integers(0, 4)] * 4),
    orders=st.tuples(*[st.permutations(range(4))] * 2),
    gaps=st.tuples(*[st.integers(0, 2)] * 2),
    itemsize=st.sampled_from([1, 2]),
)
def test_a_strided_copy_moves_each_element_once(
    shape: tuple[int, ...],
    orders: tuple[tuple[int, ...], ...],
    gaps: tuple[int, ...],
    itemsize: int,
) -> None:
    src_stride, dst_stride = (strided(shape, *x) for x in zip(orders, gaps, strict=True))
    ops = Op.copies(
        1,
        Place(0, 5),
        Place(1, 7),
        shape=shape,
        src_stride=src_stride,
        dst_stride=dst_stride,
        itemsize=itemsize,
    )
    expected = [
        (
            5 + itemsize * int(np.dot(at, src_stride)) + x,
            7 + itemsize * int(np.dot(at, dst_stride)) + x,
        )
        for at in itertools.product(*map(range, shape))
        for x in range(itemsize)
    ]
    assert sorted(pair for op in ops for pair in bytes_moved(op)) == sorted(expected)
    assert all((op.stream, op.src_base, op.dst_base) == (1, 0, 1) for op in ops)


def test_the_usual_relayouts_are_one_copy() -> None:
    batch, rows, heads, dim = 2, 100, 24, 128
    seq_major, narrow = (
        (rows * heads * dim, heads * dim, dim, 1),
        (rows * 12 * dim, 12 * dim, dim, 1),
    )
    head_major = (rows * heads * dim, dim, rows * dim, 1)
    narrow_head_major = (rows * 12 * dim, dim, rows * dim, 1)
    for src, dst, width in (
        (seq_major, narrow, 12 * dim * 2),
        (head_major, narrow_head_major, 12 * rows * dim * 2),
    ):
        ops = Op.copies(
            0,
            Place(0, 0),
            Place(1, 0),
            shape=(batch, rows, 12, dim),
            src_stride=src,
            dst_stride=dst,
            itemsize=2,
        )
        assert [op.width for op in ops] == [width]
