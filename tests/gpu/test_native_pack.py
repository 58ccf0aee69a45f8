"""The pack kernel: strided tensors to anywhere, in one launch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit import native
from tests.gpu.native_cases import LAYOUTS, empty, fill, needs_gpu, needs_two_gpus, same_bits

pytestmark = [*needs_gpu, pytest.mark.timeout(120)]


def run(pairs: list[tuple[Tensor, Tensor]]) -> None:
    native.load().pack(pairs, stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [128, 72, 7, 2, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_moves_every_element(dtype: torch.dtype, head_dim: int, layout: str) -> None:
    pairs = []
    for i, rows in enumerate((65, 300, 1, 0)):
        shape = (2, rows, 3, head_dim)
        src = fill(empty(shape, layout, dtype=dtype, pad_heads=i), i)
        pairs.append((src, empty(shape, LAYOUTS[i % 3], dtype=dtype, pad_heads=3 - i)))
    run(pairs)
    for i, (src, dst) in enumerate(pairs):
        assert same_bits(src, dst), f"pair {i}"


def test_nothing_beside_the_destination_is_written() -> None:
    src = fill(empty((2, 33, 3, 128)), 0)
    memory = torch.full((2, 33, 7, 128), 5.0, dtype=torch.bfloat16, device="cuda:0")
    run([(src, memory[:, :, 2:5])])
    assert memory[:, :, :2].eq(5).all() and memory[:, :, 5:].eq(5).all()
    assert same_bits(memory[:, :, 2:5], src)


def test_sixteen_items_and_no_more() -> None:
    pairs = [(fill(empty((1, 9, 2, 64)), i), empty((1, 9, 2, 64))) for i in range(17)]
    run(pairs[:16])
    assert all(same_bits(src, dst) for src, dst in pairs[:16])
    with pytest.raises(ValueError, match="at most 16 pairs, got 17"):
        run(pairs)


@needs_two_gpus
def test_into_a_peers_memory() -> None:
    torch.zeros(1, device="cuda:0").to("cuda:1")  # torch enables peer access
    pairs = []
    for i in range(3):
        src = fill(empty((1, 515, 6, 128), pad_heads=6), i)
        pairs.append((src, empty((1, 515, 6, 128), device="cuda:1")))
    torch.cuda.synchronize(1)
    run(pairs)
    assert all(same_bits(src.cpu(), dst.cpu()) for src, dst in pairs)
