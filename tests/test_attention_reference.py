"""The oracle itself: equal to torch's float64 attention, and its error measure."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from swiftfusion_xdit.attention import reference
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from tests.attention_cases import Case, cases


@given(case=cases())
def test_equals_torch_in_float64(case: Case) -> None:
    q, k, v = case.tensors()
    q64, k64, v64 = (x.double().transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q64, k64, v64, enable_gqa=True).transpose(1, 2)
    out = reference_attention(q, k, v)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_equals_a_loop_over_single_scores() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, 2, 4, 3, generator=generator).double()
    k = torch.randn(1, 5, 2, 3, generator=generator).double()
    v = torch.randn(1, 5, 2, 3, generator=generator).double()
    out = reference_attention(q, k, v, scale=0.7)
    for row in range(2):
        for head in range(4):
            keys, values = k[0, :, head // 2], v[0, :, head // 2]
            shares = [math.exp(0.7 * float(q[0, row, head] @ key)) for key in keys]
            mean = sum(share * value for share, value in zip(shares, values, strict=True))
            torch.testing.assert_close(out[0, row, head], mean / sum(shares))


def test_chunking_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, n, 3, 8) for n in (17, 5, 5))
    whole = reference_attention(q, k, v)
    monkeypatch.setattr(reference, "_MAX_SCORE_BYTES", 8 * 2 * 3 * 5 * 4)
    torch.testing.assert_close(reference_attention(q, k, v), whole, rtol=1e-14, atol=1e-14)


def test_no_keys_gives_zero() -> None:
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 0, 4, 8)
    assert torch.equal(reference_attention(q, k, k), torch.zeros(2, 3, 4, 8).double())


def test_refuses_heads_that_do_not_divide() -> None:
    q, k = torch.randn(1, 3, 5, 8), torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError, match="multiple of the number of kv heads; got 5 and 2"):
        reference_attention(q, k, k)


@pytest.mark.parametrize(
    ("out", "ref", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 5.0], [3.0, 4.0], 0.2),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-30, 0.0], [0.0, 0.0], math.inf),
        ([math.nan, 4.0], [3.0, 4.0], math.inf),
        ([math.inf, 4.0], [3.0, 4.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_relative_error(out: list[float], ref: list[float], expected: float) -> None:
    assert relative_error(torch.tensor(out), torch.tensor(ref)) == pytest.approx(expected)


def test_relative_error_refuses_broadcasting() -> None:
    with pytest.raises(ValueError, match=r"same shape; got \(2, 1\) and \(2,\)"):
        relative_error(torch.zeros(2, 1), torch.zeros(2))
