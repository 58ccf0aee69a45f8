"""What the compiled part costs: merges against a copy, a program on the host, scatters by size.

    python -m benchmarks.native

One GPU; where there are two with peer access, the scatter goes to the other one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from swiftfusion_xdit import native
from swiftfusion_xdit.native import ABSOLUTE, Op, Place

NUM_ROUNDS = 30
SETS = 4  # rotated through, so that a cache does not hold the inputs


def median_us(call: Callable[[int], object], *, repeats: int = 1) -> float:
    """Device time of one call; ``repeats`` calls between two events hide the launches."""
    for i in range(3):
        call(i)
    samples = []
    for i in range(NUM_ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        for j in range(repeats):
            call(i * repeats + j)
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / repeats)
    return statistics.median(samples)


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def merges(lib: native.Native) -> None:
    rows, heads, dim = 32768, 24, 128
    shape = (1, rows, heads, dim)

    def tensors() -> Tensor:
        return torch.randn(shape, device="cuda").bfloat16()

    sources, targets = [tensors() for _ in range(SETS)], [tensors() for _ in range(SETS)]
    copy_us = median_us(lambda i: targets[i % SETS].copy_(sources[i % SETS]), repeats=4)
    num_bytes = sources[0].nbytes
    copy_gbs = 2 * num_bytes / copy_us / 1e3
    print(f"copy {copy_us:.0f} us, {copy_gbs:.0f} GB/s read and written")
    for count in (1, 2, 3, 4, 8):
        sets = [
            [(tensors(), torch.randn(1, heads, rows, device="cuda")) for _ in range(count)]
            for _ in range(2)
        ]
        us = median_us(
            lambda i, sets=sets: lib.merge(sets[i % 2], out=targets[i % SETS], stream=stream()),
            repeats=4,
        )
        gbs = (count + 1) * num_bytes / us / 1e3
        print(f"merge of {count}: {us:.0f} us, {gbs:.0f} GB/s, {gbs / copy_gbs:.0%} of the copy's")


def layer_like_program() -> tuple[list[Op], Tensor]:
    """About a layer of one head group: 8 waits, 10 copies, 8 writes, forks and joins."""
    memory = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    flags = [Place(ABSOLUTE, memory.data_ptr() + 64 * i) for i in range(8)]
    ops = [Op.record(0, 0), Op.wait_event(1, 0), Op.wait_event(2, 0)]
    ops += [Op.write(1, flag) for flag in flags]
    for i in range(10):
        # src and dst of each copy: 64 rows of 256 bytes, out of rows of 512.
        copy = Op(stream=1, width=256, height=64, depth=1, src_pitch=512, dst_pitch=512)
        copy.src_offset, copy.dst_offset = 4096 + i * 65536, 4096 + i * 65536 + 32768
        ops.append(copy)
    ops += [op for flag in flags for op in (Op.wait(1, flag), Op.clear(1, flag))]
    return [
        *ops,
        Op.record(1, 1),
        Op.record(2, 2),
        Op.wait_event(0, 1),
        Op.wait_event(0, 2),
    ], memory


def host_time(lib: native.Native) -> None:
    ops, memory = layer_like_program()
    for batch_flags in (True, False):
        program = lib.program(ops, batch_flags=batch_flags)
        streams = [torch.cuda.Stream().cuda_stream for _ in range(3)]
        samples = []
        for _ in range(300):
            start = time.perf_counter_ns()
            program.run(0, len(ops), [memory.data_ptr()], streams)
            samples.append((time.perf_counter_ns() - start) / 1e3)
            torch.cuda.synchronize()
        print(
            f"program of {len(ops)} ops, batch_flags={batch_flags}: "
            f"{statistics.median(samples):.1f} us of host time"
        )


def scatters(lib: native.Native) -> None:
    peer = torch.cuda.device_count() > 1 and torch.cuda.can_device_access_peer(0, 1)
    target = "cuda:1" if peer else "cuda:0"
    torch.zeros(1, device="cuda:0").to(target)  # torch enables peer access
    for rows in (16, 64, 256, 1024, 2304, 8448, 18688):
        src = [torch.randn(1, rows, 24, 128, device="cuda").bfloat16()[:, :, 12:] for _ in "qkv"]
        dst = [torch.empty(1, rows, 12, 128, dtype=torch.bfloat16, device=target) for _ in "qkv"]
        bases = [x.data_ptr() for x in (*src, *dst)]
        times = []
        for by_kernel in (False, True):
            ops: list[Op] = []
            for i, (a, b) in enumerate(zip(src, dst, strict=True)):
                ops += Op.copies(
                    0,
                    Place(i, 0),
                    Place(3 + i, 0),
                    shape=a.shape,
                    src_stride=a.stride(),
                    dst_stride=b.stride(),
                    itemsize=2,
                    by_kernel=by_kernel,
                )
            program = lib.program(ops)
            program.bind(bases, [stream()])
            times.append(median_us(lambda _, p=program: p.run(), repeats=4))
        engines, kernel = times
        print(
            f"q, k, v to {target}, {3 * dst[0].nbytes / 2**20:.2f} MiB: copy engines "
            f"{engines:.1f} us, one kernel {kernel:.1f} us"
        )


def main() -> None:
    lib = native.load()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    merges(lib)
    host_time(lib)
    scatters(lib)


if __name__ == "__main__":
    main()
