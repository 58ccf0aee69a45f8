"""A row survives the wire up to the rounding of e4m3, whatever its size, and hides nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swiftfusion_xdit import wire

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def there_and_back(x: torch.Tensor) -> torch.Tensor:
    return wire.decode(wire.encode(x), head_dim=x.shape[-1], dtype=x.dtype)


@given(
    head_dim=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-10, 12),
    outlier=st.sampled_from([1.0, 30.0, 1000.0]),
    seed=st.integers(0, 999),
)
def test_every_element_is_close(
    head_dim: int, dtype: torch.dtype, exponent: int, outlier: float, seed: int
) -> None:
    x = torch.randn(2, 5, 3, head_dim, generator=torch.Generator().manual_seed(seed))
    x[..., 0] *= outlier
    x = (x * 2.0**exponent).clamp(-6e4, 6e4).to(dtype)
    error = (there_and_back(x).double() - x.double()).abs()
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    # Half a step of e4m3: of a normal number, or of one below 2 ** -6; then the dtype's own.
    half_step = torch.maximum(x.double().abs() / 16, scale * 2.0**-10)
    own = 2 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * x.double().abs()
    smallest = torch.finfo(dtype).smallest_normal
    assert bool((error <= half_step + own + smallest).all())


@given(head_dim=st.integers(1, 300))
def test_rows_are_aligned_and_nothing_else_is_added(head_dim: int) -> None:
    assert wire.row_bytes(head_dim) % wire.ROW_ALIGNMENT_BYTES == 0
    assert head_dim + 4 <= wire.row_bytes(head_dim) < head_dim + 4 + wire.ROW_ALIGNMENT_BYTES
    assert wire.row_bytes(128) == 144


def test_rows_do_not_depend_on_each_other() -> None:
    x = torch.randn(1, 6, 4, 24)
    whole = wire.encode(x)
    assert whole.shape == (1, 6, 4, wire.row_bytes(24)) and whole.dtype == torch.uint8
    assert torch.equal(whole[:, 2:5, 1:3], wire.encode(x[:, 2:5, 1:3]))
    window = wire.decode(whole[:, 2:5, 1:3], head_dim=24, dtype=torch.float32)
    assert torch.equal(window, there_and_back(x)[:, 2:5, 1:3])
    assert window.is_contiguous()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x = torch.randn(3, 8)
    x[1, 5] = bad
    back = there_and_back(x)
    assert bool(back[1].isnan().all())
    assert bool(back[[0, 2]].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_range(dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, 3e38)
    rows = torch.tensor([[0.0] * 4, [largest, -largest, 0.0, 0.0], [1e-45, 0.0, -1e-40, 0.0]])
    x = rows.to(dtype)
    back = there_and_back(x)
    assert torch.equal(back[0], x[0])
    torch.testing.assert_close(back[1], x[1], rtol=1e-6, atol=0)
    assert bool((back[2].abs() <= 2e-38).all())


def test_no_rows() -> None:
    assert there_and_back(torch.empty(2, 0, 3, 16)).shape == (2, 0, 3, 16)
