"""`attend` writes into the tensor that it is given."""

from __future__ import annotations

import pytest
import torch

from swiftfusion_xdit.attention import attend, select_backend
from tests.attention_cases import LAYOUTS, in_layout

CPU = select_backend("cpu", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_any_layout(layout: str, dtype: torch.dtype, kv_heads: int) -> None:
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 7, kv_heads, 16)
    expected, expected_lse = attend(q, k, k, scale=0.3, backend=CPU)
    out = in_layout(torch.full(q.shape, torch.nan, dtype=dtype), layout)
    result, lse = attend(q, k, k, scale=0.3, backend=CPU, out=out)
    assert result is out
    assert torch.equal(out, expected.to(dtype)) and torch.equal(lse, expected_lse)


def test_no_keys() -> None:
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 0, 4, 16)
    out = torch.full_like(q, torch.nan)
    result, lse = attend(q, k, k, scale=0.3, backend=CPU, out=out)
    assert result is out and torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full((2, 4, 9), -torch.inf))


@pytest.mark.parametrize(
    "out", [torch.zeros(1, 9, 4, 8), torch.zeros(1, 9, 4, 16, device="meta")], ids=["shape", "meta"]
)
def test_out_that_does_not_fit(out: torch.Tensor) -> None:
    q = torch.randn(1, 9, 4, 16)
    with pytest.raises(ValueError, match=r"out must have q's shape \(1, 9, 4, 16\) and device cpu"):
        attend(q, q, q, scale=1.0, backend=CPU, out=out)
