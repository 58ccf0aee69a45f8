"""Stream programs: copies, flags and events, in order, eager and replayed from a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit import native
from swiftfusion_xdit.native import ABSOLUTE, NativeError, Op, Place
from tests.gpu.native_cases import (
    LAYOUTS,
    copy_ops,
    empty,
    fill,
    needs_gpu,
    needs_two_gpus,
    same_bits,
    storage,
)

pytestmark = [*needs_gpu, pytest.mark.timeout(120)]

SHAPES = [(1, 33, 4, 128), (2, 17, 3, 64), (3, 5, 2, 72), (1, 1, 1, 8), (2, 0, 3, 16)]


def handle(stream: torch.cuda.Stream) -> int:
    return stream.cuda_stream


def flag_at(flags: Tensor, index: int) -> Place:
    return Place(ABSOLUTE, flags.data_ptr() + index * flags.element_size())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("src_layout", LAYOUTS)
@pytest.mark.parametrize("dst_layout", LAYOUTS)
@pytest.mark.parametrize("pad_heads", [0, 2])
@pytest.mark.parametrize(
    ("by_kernel", "plane_loop"), [(False, False), (False, True), (True, False)]
)
def test_copies_move_what_they_name_and_nothing_else(
    shape: tuple[int, int, int, int],
    src_layout: str,
    dst_layout: str,
    pad_heads: int,
    by_kernel: bool,
    plane_loop: bool,
) -> None:
    pairs = []
    for seed in range(2):
        src = fill(empty(shape, src_layout, pad_heads=pad_heads), seed)
        dst = empty(shape, dst_layout, pad_heads=3 - pad_heads)
        pairs.append((src, dst, storage(dst)))
    ops: list[Op] = []
    for i, (src, dst, _) in enumerate(pairs):
        ops += copy_ops(0, (2 * i, src), (2 * i + 1, dst), by_kernel=by_kernel)
    expected = []
    for src, dst, memory in pairs:
        wanted = memory.clone()
        wanted.as_strided(dst.shape, dst.stride(), dst.storage_offset()).copy_(src)
        expected.append(wanted)
    program = native.load().program(ops, plane_loop=plane_loop)
    bases = [x.data_ptr() for src, dst, _ in pairs for x in (src, dst)]
    program.run(0, len(ops), bases[: program.num_bases], [0][: program.num_streams])
    torch.cuda.synchronize()
    for (_, _, memory), wanted in zip(pairs, expected, strict=True):
        assert same_bits(memory, wanted)


@pytest.mark.parametrize("batch_flags", [True, False])
@pytest.mark.parametrize("captured", [False, True])
def test_a_reader_sees_what_was_written_before_the_flag(batch_flags: bool, captured: bool) -> None:
    """FULL and FREE between two streams, which stand for two ranks.

    Every wait is for something enqueued before it: two streams of a GPU may share one queue.
    """
    src, slot, result = (torch.zeros(1 << 20, dtype=torch.int32, device="cuda:0") for _ in "abc")
    flags = torch.zeros(2, dtype=torch.int32, device="cuda:0")
    full, free = flag_at(flags, 0), flag_at(flags, 1)
    size = {"width": src.numel() * src.element_size(), "height": 1, "depth": 1}
    put = [
        Op.wait(0, free),
        Op.clear(0, free),
        Op(src_base=0, dst_base=1, **size),
        Op.write(0, full),
    ]
    get = [
        Op.wait(0, full),
        Op.clear(0, full),
        Op(src_base=1, dst_base=2, **size),
        Op.write(0, free),
    ]
    bases = [src.data_ptr(), slot.data_ptr(), result.data_ptr()]
    writer, reader = torch.cuda.Stream(), torch.cuda.Stream()
    programs = [native.load().program(ops, batch_flags=batch_flags) for ops in (put, get)]
    for program, stream in zip(programs, (writer, reader), strict=True):
        program.bind(bases[: program.num_bases], [handle(stream)])
    flags[1] = 1
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in programs]
    if captured:
        for graph, program, stream in zip(graphs, programs, (writer, reader), strict=True):
            with torch.cuda.graph(graph, stream=stream):
                program.run()
    enqueue = [graph.replay for graph in graphs] if captured else [x.run for x in programs]
    for i in range(300):
        with torch.cuda.stream(writer):
            if i < 10:
                torch.cuda._sleep(2_000_000)  # about a millisecond, in which the reader waits
            src.fill_(i + 1)
            enqueue[0]()
        with torch.cuda.stream(reader):
            enqueue[1]()
        reader.synchronize()
        assert result.eq(i + 1).all(), f"round {i}"
        assert flags.tolist() == [0, 1], f"round {i}"


def test_fork_and_join_are_captured() -> None:
    x = torch.zeros(1 << 20, dtype=torch.int32, device="cuda:0")
    y = torch.zeros_like(x)
    op = Op(stream=1, src_base=0, dst_base=1, width=x.numel() * 4, height=1, depth=1)
    program = native.load().program(
        [Op.record(0, 0), Op.wait_event(1, 0), op, Op.record(1, 1), Op.wait_event(0, 1)]
    )
    main, side = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=main):
        x.add_(1)
        program.run(0, 5, [x.data_ptr(), y.data_ptr()], [handle(main), handle(side)])
        y.mul_(2)
    for i in range(1, 50):
        with torch.cuda.stream(main):
            graph.replay()
        main.synchronize()
        assert y.eq(2 * i).all(), f"round {i}"


@pytest.mark.parametrize("batch_flags", [True, False])
def test_long_runs_of_flags_keep_their_order(batch_flags: bool) -> None:
    num_flags = 300
    flags = torch.zeros(num_flags, dtype=torch.int32, device="cuda:0")
    ops = [Op.write(0, flag_at(flags, i), value=i + 1) for i in range(num_flags)]
    for i in range(0, num_flags, 2):
        flag = flag_at(flags, i)
        ops += [Op.wait(0, flag, value=i + 1), Op.clear(0, flag)]
    program = native.load().program(ops, batch_flags=batch_flags)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    program.run(0, 7, [], [handle(stream)])
    program.run(7, streams=[handle(stream)])
    stream.synchronize()
    assert flags.tolist() == [0 if i % 2 == 0 else i + 1 for i in range(num_flags)]


def test_events_order_streams() -> None:
    x = torch.zeros(1 << 20, dtype=torch.int32, device="cuda:0")
    y = torch.full_like(x, -1)
    op = Op(stream=1, src_base=0, dst_base=1, width=x.numel() * 4, height=1, depth=1)
    program = native.load().program(
        [Op.record(0, 0), Op.wait_event(1, 0), op, Op.record(1, 1), Op.wait_event(0, 1)]
    )
    main, side = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(main):
        for i in range(20):
            torch.cuda._sleep(2_000_000)  # about a millisecond: a missing wait would be seen
            x.fill_(i)
            program.run(0, 5, [x.data_ptr(), y.data_ptr()], [handle(main), handle(side)])
            assert bool(y.eq(i).all()), f"round {i}"


def test_the_failing_op_is_named() -> None:
    ops = [
        Op.record(0, 0),
        Op(stream=1, src_base=0, dst_base=ABSOLUTE, dst_offset=0, width=64, height=1, depth=1),
    ]
    program = native.load().program(ops)
    x = torch.zeros(64, dtype=torch.uint8, device="cuda:0")
    with pytest.raises(NativeError, match=r"op 1 \(copy, stream 1\): cudaMemcpyAsync: .+"):
        program.run(0, 2, [x.data_ptr()], [0, 0])
    assert x.add(1).sum().item() == 64, "the error must not stay behind"


@needs_two_gpus
@pytest.mark.parametrize("batch_flags", [True, False])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_put_signal_wait_release_between_gpus(batch_flags: bool, by_kernel: bool) -> None:
    """Each GPU puts q, k and v heads into the other's slots, in turn, without a host wait."""
    lib, shape, rounds = native.load(), (1, 257, 6, 128), 50
    devices = ("cuda:0", "cuda:1")
    for a, b in (devices, devices[::-1]):
        torch.zeros(1, device=a).to(b)  # torch enables peer access
    src = [[empty(shape, device=d, pad_heads=6) for _ in range(3)] for d in devices]
    slot = [[empty(shape, device=d) for _ in range(3)] for d in devices]
    seen = [[[torch.empty_like(x) for x in slot[d]] for _ in range(rounds)] for d in (0, 1)]
    # Nothing is allocated and no kernel is new inside the rounds: either may wait for a GPU that
    # waits for the other.
    sent = [
        [[fill(torch.empty_like(x), 1000 * d + i) for x in slot[d]] for i in range(rounds)]
        for d in (0, 1)
    ]
    for d in (0, 1):
        src[d][0].copy_(sent[d][0][0])
    flags = [torch.zeros(2, dtype=torch.int32, device=d) for d in devices]  # FULL, FREE
    programs, streams = [], []
    for d, device in enumerate(devices):
        peer = 1 - d
        free = flag_at(flags[d], 1)
        put = [Op.wait(1, free), Op.clear(1, free)]
        for i in range(3):
            put += copy_ops(1, (i, src[d][i]), (3 + i, slot[peer][i]), by_kernel=by_kernel)
        put.append(Op.write(1, flag_at(flags[peer], 0)))
        full = flag_at(flags[d], 0)
        get = [Op.wait(0, full), Op.clear(0, full)]
        for i in range(3):
            get += copy_ops(0, (6 + i, slot[d][i]), (9 + i, slot[d][i]))
        get.append(Op.write(0, flag_at(flags[peer], 1)))
        ops = [
            Op.record(0, 0),
            Op.wait_event(1, 0),
            *put,
            *get,
            Op.record(1, 1),
            Op.wait_event(0, 1),
        ]
        with torch.cuda.device(device):
            programs.append(lib.program(ops, batch_flags=batch_flags))
            streams.append((torch.cuda.Stream(), torch.cuda.Stream()))
        flags[d][1] = 1
    for device in devices:
        torch.cuda.synchronize(device)
    for i in range(rounds):
        for d, device in enumerate(devices):
            with torch.cuda.device(device), torch.cuda.stream(streams[d][0]):
                for x, y in zip(src[d], sent[d][i], strict=True):
                    x.copy_(y)
                tensors = [*src[d], *slot[1 - d], *slot[d], *seen[d][i]]
                bases = [x.data_ptr() for x in tensors]
                programs[d].run(0, None, bases, [handle(x) for x in streams[d]])
    for device in devices:
        torch.cuda.synchronize(device)
    for i in range(rounds):
        for d in (0, 1):
            for got, wanted in zip(seen[d][i], sent[1 - d][i], strict=True):
                assert same_bits(got.cpu(), wanted.cpu()), f"round {i}, GPU {d}"
