"""A put fills exactly the elements of its region, whatever the strides, dtype and offset."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftfusion_xdit.comm import Flag, Region, ShmCommunicator
from swiftfusion_xdit.topology import Topology
from tests.distributed import RankPool, run_ranks

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int) -> torch.Tensor:
    """Any bits but for bool, NaNs included: a copy must keep them."""
    high = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(high, size, dtype=torch.uint8, generator=generator).view(dtype)


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    packed = torch.empty(values.shape, dtype=values.dtype).copy_(values)
    return packed.flatten().view(torch.uint8)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, object]:
    """A region with gaps and permuted dims, and a source with its own strides."""
    ndim = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.integers(0, 5)) for _ in range(ndim))
    stride = [0] * ndim
    step = draw(st.integers(1, 3))
    for dim in draw(st.permutations(range(ndim))):
        stride[dim] = step
        step = step * max(shape[dim], 1) + draw(st.integers(0, 4))
    return {
        "region": Region(draw(st.integers(0, 9)) * dtype.itemsize, shape, tuple(stride), dtype),
        "src_order": draw(st.permutations(range(ndim))),
        "src_steps": [draw(st.integers(1, 3)) for _ in range(ndim)],
        "tail_bytes": draw(st.integers(0, 40)),
        "seed": draw(st.integers(0, 1000)),
    }


def strided_source(case: dict) -> torch.Tensor:
    """Random values of the region's shape, on permuted dims that skip elements."""
    region, order, steps = case["region"], case["src_order"], case["src_steps"]
    sizes = [max(region.shape[dim], 1) * steps[dim] for dim in order]
    values = random_bits(tuple(sizes), region.dtype, seed=case["seed"])
    values = values.permute([order.index(dim) for dim in range(len(order))])
    return values[tuple(slice(0, n * s, s) for n, s in zip(region.shape, steps, strict=True))]


def put_and_compare(rank: int, world_size: int, case: dict) -> None:
    region = case["region"]
    src = strided_source(case)
    assert src.shape == region.shape
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        buffer = comm.allocate(region.end_bytes + case["tail_bytes"], num_flags=1)
        buffer.local.fill_(1 if region.dtype == torch.bool else 0xA5)
        expected = buffer.local.clone()
        dist.barrier()
        peer = (rank + 1) % world_size
        comm.put(src, buffer, region, peer)
        comm.signal(buffer, 0, peer)
        comm.wait(buffer, Flag(0, "FULL"), (rank - 1) % world_size)
        region.view(expected).copy_(src)
        assert torch.equal(buffer.local, expected)
        got = comm.get(buffer, region, peer)
        assert got.is_contiguous()
        assert got.dtype == region.dtype
        assert torch.equal(as_bytes(got), as_bytes(src))
        dist.barrier()
        buffer.local.zero_()
        assert torch.equal(as_bytes(got), as_bytes(src)), "get must return a copy"


@settings(max_examples=60)
@given(case=layouts())
def test_any_layout(rank_pool: Callable[[int], RankPool], case: dict) -> None:
    rank_pool(2).run(put_and_compare, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(rank_pool: Callable[[int], RankPool], dtype: torch.dtype) -> None:
    case = {
        "region": Region(8 * dtype.itemsize, (2, 5, 3, 4), (90, 12, 4, 1), dtype),
        "src_order": [0, 2, 1, 3],
        "src_steps": [1, 1, 2, 1],
        "tail_bytes": 3,
        "seed": 0,
    }
    rank_pool(2).run(put_and_compare, case)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (2, 3), (3,)), "one stride per dim"),
        ((-4, (2,), (1,)), "must be >= 0"),
        ((0, (2,), (-1,)), "must be >= 0"),
        ((0, (-2,), (1,)), "must be >= 0"),
        ((6, (2,), (1,)), "offset_bytes must be a multiple of 4"),
    ],
)
def test_a_bad_region_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Region(*arguments, torch.float32)


def bad_transfers(rank: int, world_size: int) -> None:
    region = Region(0, (4, 8), (8, 1), torch.float32)
    with ShmCommunicator(dist.group.WORLD, Topology.split(world_size, 1), timeout_s=30) as comm:
        buffer = comm.allocate(region.num_bytes, num_flags=1)
        src = torch.ones(4, 8)
        for wrong in (src[:1], src[0], src.double(), src.T, src.bfloat16()):
            with pytest.raises(ValueError, match="src must have the region's shape and dtype"):
                comm.put(wrong, buffer, region, 0)
        late = Region(4, (4, 8), (8, 1), torch.float32)
        with pytest.raises(ValueError, match="ends at byte 132 of 128"):
            comm.put(src, buffer, late, 0)
        with pytest.raises(ValueError, match="ends at byte 132 of 128"):
            comm.get(buffer, late, 0)
        for peer in (-1, 1):
            with pytest.raises(ValueError, match=rf"peer must be a rank in \[0, 1\), got {peer}"):
                comm.put(src, buffer, region, peer)
            with pytest.raises(ValueError, match=rf"peer must be a rank in \[0, 1\), got {peer}"):
                comm.signal(buffer, 0, peer)
            with pytest.raises(ValueError, match=rf"peer must be a rank in \[0, 1\), got {peer}"):
                comm.wait(buffer, Flag(0, "x"), peer)
        for index in (-1, 1):
            with pytest.raises(ValueError, match=rf"flag index must be in \[0, 1\), got {index}"):
                comm.signal(buffer, index, 0)
            with pytest.raises(ValueError, match=rf"flag index must be in \[0, 1\), got {index}"):
                comm.wait(buffer, Flag(index, "x"), 0)
        assert not buffer.local.any()
        assert comm.counters.as_dict()["same_rank"]["messages"] == 0


def test_a_bad_transfer_is_refused_and_moves_nothing() -> None:
    run_ranks(1, bad_transfers)
