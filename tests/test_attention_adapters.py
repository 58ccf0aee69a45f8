"""How kernels for GPUs are called: layouts as they are, `out` passed on, copies only if needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit.attention import select_backend
from swiftfusion_xdit.attention.gpu import readable
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from tests.attention_cases import in_layout, reference_lse
from tests.fake_kernels import GPU, FakeGpu

HOPPER = (9, 0)
# The head dim is 16 and rows have 3 heads, so these are aligned.
IN_PLACE = ("bshd", "bhsd", "sbhd", "fused", "every_other_row")
COPIED = ("padded", "dim_strided")


def tensors(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    q, k, v = (
        in_layout(torch.randn(2, rows, 3, 16, generator=rng).bfloat16(), layout)
        for rows in (9, 11, 11)
    )
    return q, k, v


def same_view(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.shape == y.shape


def assert_right(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    assert relative_error(out, reference_attention(q, k, v, scale=0.3)) <= 5e-3
    assert lse.shape == (2, 3, 9) and lse.dtype == torch.float32
    assert (lse - reference_lse(q, k, scale=0.3)).abs().max() <= 3e-4


@pytest.mark.parametrize("layout", (*IN_PLACE, *COPIED))
@pytest.mark.parametrize("name", ["fa4", "fa3", "fa2"])
def test_kernel_gets_the_views_themselves(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, HOPPER)
    gpu.install(name)
    q, k, v = tensors(layout)
    out, lse = select_backend(name, GPU).forward(q, k, v, 0.3)
    assert_right(out, lse, q, k, v)
    (call,) = gpu.calls
    for x, given in ((q, call["q"]), (k, call["k"]), (v, call["v"])):
        assert same_view(x, given) == (layout in IN_PLACE)
        assert given.data_ptr() % 16 == 0 and given.stride(3) == 1
        assert all(stride % 8 == 0 for stride in given.stride()[:3])


@pytest.mark.parametrize("layout", (*IN_PLACE, *COPIED))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["fa4", "fa2"])
def test_out(name: str, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, HOPPER)
    gpu.install(name)
    q, k, v = tensors("bshd")
    out = in_layout(torch.full(q.shape, torch.nan, dtype=dtype), layout)
    backend = select_backend(name, GPU)
    result, lse = backend.forward(q, k, v, 0.3, out)
    assert result is out
    assert_right(out, lse, q, k, v)
    passed_on = gpu.calls[0]["out"]
    wanted = backend.writes_out and dtype == q.dtype and layout in IN_PLACE
    # FA4 always stores into memory that it is given; then it is not the caller's.
    assert (passed_on is out) if wanted else (passed_on is not out)


def test_fa3_of_before_the_lse_had_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, HOPPER)

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: Any = None) -> Any:
        return gpu._compute(q, k, v, softmax_scale, None)

    gpu.install("fa3", flash_attn_func=flash_attn_func)
    q, k, v = tensors("bhsd")
    assert_right(*select_backend("fa3", GPU).forward(q, k, v, 0.3), q, k, v)


@pytest.mark.parametrize("lse_dims", [3, 4])
def test_cudnn(lse_dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch, HOPPER)
    gpu.cudnn(91900)

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_bias: None,
        compute_log_sumexp: bool,
        *others: Any,
        scale: float,
    ) -> tuple[Any, ...]:
        assert attn_bias is None and compute_log_sumexp and others == (0.0, False, False)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = gpu._compute(q, k, v, scale, None)
        return out.transpose(1, 2), lse.unsqueeze(-1) if lse_dims == 4 else lse, None, None

    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_cudnn_attention", kernel, raising=False
    )
    q, k, v = tensors("fused")
    assert_right(*select_backend("cudnn", GPU).forward(q, k, v, 0.3), q, k, v)
    assert same_view(gpu.calls[0]["q"], q)


@pytest.mark.parametrize("name", ["cudnn", "sdpa_flash"])
def test_torch_flash_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which also serves a single key of cuDNN."""
    gpu = FakeGpu(monkeypatch, HOPPER)
    gpu.cudnn(91900)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *others: Any, scale: float) -> tuple[Any, ...]:
        assert others == (0.0, False, False)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = gpu._compute(q, k, v, scale, None)
        return out.transpose(1, 2), lse, None, None

    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_flash_attention", kernel, raising=False
    )
    q, k, v = tensors("fused")
    k, v = k[:, :1], v[:, :1]
    assert_right(*select_backend(name, GPU).forward(q, k, v, 0.3), q, k, v)
    assert len(gpu.calls) == 1


def test_strides_of_dims_of_size_1_need_no_copy() -> None:
    x = torch.randn(40).bfloat16().as_strided((1, 2, 1, 8), (3, 16, 0, 1))
    view = readable(x)
    assert view.data_ptr() == x.data_ptr() and torch.equal(view, x)
    assert all(stride % 8 == 0 and stride > 0 for stride in view.stride()[:3])


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((2, 3, 2, 8), (48, 16, 8, 1), 1),  # address
        ((2, 3, 2, 8), (60, 20, 8, 1), 0),  # rows
        ((2, 3, 2, 8), (48, 16, 1, 2), 0),  # head dim
        ((2, 3, 2, 8), (48, 0, 8, 1), 0),  # one row expanded
    ],
)
def test_what_kernels_cannot_read_is_copied(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    x = torch.randn(200).bfloat16().as_strided(shape, stride, offset)
    copy = readable(x)
    assert torch.equal(copy, x) and copy.is_contiguous()
    assert copy.data_ptr() != x.data_ptr() and copy.data_ptr() % 16 == 0
