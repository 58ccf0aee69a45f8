"""The merge kernel against fp64 and against torch's operations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit import native
from swiftfusion_xdit.attention.reference import relative_error
from tests.gpu.native_cases import LAYOUTS, empty, fill, needs_gpu, needs_two_gpus, same_bits

pytestmark = [*needs_gpu, pytest.mark.timeout(120)]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, FP32)]
DTYPES.append((FP16, FP32))
# Rounding of the result; the sums are fp32.
TOLERANCE = {BF16: 3e-3, FP16: 4e-4, FP32: 1e-6}

Partials = list[tuple[Tensor, Tensor]]


def make_partials(
    count: int, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, pad_heads: int
) -> Partials:
    batch, rows, heads, _ = shape
    partials = []
    for i in range(count):
        out = fill(empty(shape, layout, dtype=dtype, pad_heads=pad_heads), i)
        # Strides in every order: lse as kernels give it, or cut out of a longer one.
        lse = torch.empty(batch, heads, rows + i, device="cuda:0")[:, :, i:]
        partials.append((out, fill(lse, 100 + i).mul_(8).add_(90)))
    return partials


def reference(partials: Partials) -> Tensor:
    lses = torch.stack([lse.double() for _, lse in partials])
    weights = torch.softmax(lses, dim=0).nan_to_num(0.0).transpose(2, 3).unsqueeze(-1)
    outs = torch.stack([out.double() for out, _ in partials])
    return torch.where(weights == 0, 0.0, outs * weights).sum(0)


def run(partials: list[tuple[Tensor, Tensor | None]] | Partials, out: Tensor) -> Tensor:
    stream = torch.cuda.current_stream().cuda_stream
    native.load().merge(partials, out=out, stream=stream)
    torch.cuda.synchronize()
    return out


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("in_dtype, out_dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256, 7, 130])
def test_merge_is_the_weighted_sum(
    count: int, in_dtype: torch.dtype, out_dtype: torch.dtype, head_dim: int
) -> None:
    shape = (2, 37, 3, head_dim)
    for layout, pad_heads in zip(LAYOUTS, (0, 1, 2), strict=True):
        partials = make_partials(count, shape, in_dtype, layout, pad_heads)
        out = run(partials, empty(shape, "bshd", dtype=out_dtype, pad_heads=2 - pad_heads))
        assert relative_error(out, reference(partials)) <= TOLERANCE[out_dtype], (layout, pad_heads)
        again = run(partials, torch.empty_like(out))
        assert same_bits(again, out), "not deterministic"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("head_dim", [128, 7])
def test_one_partial_is_copied_bit_for_bit_without_its_lse(
    dtype: torch.dtype, head_dim: int
) -> None:
    shape = (1, 65, 5, head_dim)
    ((partial, _),) = make_partials(1, shape, dtype, "bhsd", 0)
    out = run([(partial, None)], empty(shape, dtype=dtype, pad_heads=3))
    assert same_bits(out, partial)


@pytest.mark.parametrize("head_dim", [128, 7])
def test_partials_without_keys_have_no_say(head_dim: int) -> None:
    shape = (2, 16, 4, head_dim)
    partials = make_partials(3, shape, BF16, "bshd", 0)
    for i, (out, lse) in enumerate(partials):
        lse[:, :, i] = -math.inf  # rows 0 to 2: one partial each
        lse[:, :, 5:7] = -math.inf  # and all of them
        out.transpose(1, 2)[lse == -math.inf] = torch.nan
    out = run(partials, empty(shape))
    assert out.isfinite().all()
    assert out[:, 5:7].eq(0).all()
    clean = [(x.nan_to_num(0.0), lse) for x, lse in partials]
    assert relative_error(out, reference(clean)) <= TOLERANCE[BF16]


def test_a_nan_is_not_hidden() -> None:
    partials = make_partials(2, (1, 8, 2, 64), BF16, "bshd", 0)
    partials[0][1][0, 1, 3] = torch.nan
    partials[1][0][0, 5, 0, 9] = torch.nan
    out = run(partials, empty((1, 8, 2, 64)))
    assert out[0, 3, 1].isnan().all()
    assert out.isnan().sum().item() == 64 + 1


def test_in_place() -> None:
    partials = make_partials(3, (1, 300, 6, 128), BF16, "bshd", 0)
    expected = run(partials, empty((1, 300, 6, 128)))
    assert same_bits(run(partials, partials[1][0]), expected)


def test_nothing_beside_the_destination_is_written() -> None:
    partials = make_partials(2, (2, 19, 3, 128), BF16, "bshd", 0)
    memory = torch.full((2, 19, 7, 128), 5.0, dtype=BF16, device="cuda:0")
    run(partials, memory[:, :, 2:5])
    assert memory[:, :, :2].eq(5).all() and memory[:, :, 5:].eq(5).all()
    assert relative_error(memory[:, :, 2:5], reference(partials)) <= TOLERANCE[BF16]


@needs_two_gpus
def test_into_a_peers_memory() -> None:
    torch.zeros(1, device="cuda:1").to("cuda:0")  # torch enables peer access
    torch.zeros(1, device="cuda:0").to("cuda:1")
    partials = make_partials(2, (1, 513, 6, 128), BF16, "bshd", 0)
    expected = run(partials, empty((1, 513, 6, 128)))
    out = empty((1, 513, 6, 128), device="cuda:1", pad_heads=6)
    torch.cuda.synchronize(1)
    assert same_bits(run(partials, out).cpu(), expected.cpu())


def test_captured_in_a_graph() -> None:
    partials = make_partials(4, (1, 100, 4, 128), BF16, "bshd", 0)
    out = empty((1, 100, 4, 128))
    native.load().preload()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native.load().merge(partials, out=out, stream=torch.cuda.current_stream().cuda_stream)
    for seed in range(5):
        fill(partials[2][0], 50 + seed)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out, run(partials, torch.empty_like(out)))
