"""Merging outputs over parts of the keys gives the output over all of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftfusion_xdit import native
from swiftfusion_xdit.attention import attend, select_backend
from swiftfusion_xdit.attention import merge as merging
from swiftfusion_xdit.attention.merge import merge
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from tests.attention_cases import LAYOUTS, Case, cases, in_layout, reference

CPU = select_backend("cpu", "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def poisoned(like: Tensor, layout: str) -> Tensor:
    return in_layout(torch.full(like.shape, torch.nan, dtype=like.dtype), layout)


def partials_of(case: Case, cuts: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Attention over the keys between neighbouring cuts; two equal cuts give an empty part."""
    q, k, v = case.tensors()
    bounds = [0, *sorted(cut % (case.num_keys + 1) for cut in cuts), case.num_keys]
    return [
        attend(q, k[:, start:stop], v[:, start:stop], scale=case.scale, backend=CPU)
        for start, stop in pairwise(bounds)
    ]


@settings(max_examples=150)
@given(
    case=cases(),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    out_layout=st.sampled_from(LAYOUTS),
)
def test_parts_of_the_keys_give_the_whole(case: Case, cuts: list[int], out_layout: str) -> None:
    partials = partials_of(case, cuts)
    out = poisoned(partials[0][0], out_layout)
    assert merge(partials, out=out) is out
    q, k, v = case.tensors()
    assert relative_error(out, reference(case, q, k, v)) <= TOLERANCE[case.dtype]
    fresh = merge(partials)
    assert fresh.dtype == case.dtype and torch.equal(fresh, out)


@given(case=cases(max_rows=64), cuts=st.lists(st.integers(0, 64), min_size=1, max_size=4))
def test_equal_partials_in_equal_order_give_equal_bits(case: Case, cuts: list[int]) -> None:
    partials = partials_of(case, cuts)
    copies = [(out.clone(), lse.clone()) for out, lse in partials]
    assert torch.equal(merge(partials), merge(copies))


@given(case=cases(max_rows=64), cuts=st.lists(st.integers(0, 64), max_size=3))
def test_partials_are_only_read_and_never_returned(case: Case, cuts: list[int]) -> None:
    partials = partials_of(case, cuts)
    before = [(out.clone(), lse.clone()) for out, lse in partials]
    merge(partials).fill_(7.0)
    for pair, copy in zip(partials, before, strict=True):
        assert torch.equal(pair[0], copy[0]) and torch.equal(pair[1], copy[1])


def test_sums_in_fp32_whatever_the_dtype() -> None:
    """Many bf16 partials: the result is the rounded fp32 sum, not a sum of rounded sums."""
    generator = torch.Generator().manual_seed(11)
    outs = [torch.randn(1, 50, 2, 8, generator=generator).bfloat16() for _ in range(64)]
    lses = [torch.randn(1, 2, 50, generator=generator) for _ in range(64)]
    shares = torch.softmax(torch.stack(lses).double(), dim=0).transpose(2, 3).unsqueeze(-1)
    exact = (torch.stack(outs).double() * shares).sum(dim=0)
    merged = merge(list(zip(outs, lses, strict=True)))
    rounded = relative_error(exact.bfloat16(), exact)
    assert relative_error(merged, exact) <= 1.01 * rounded


def test_fp32_destination_of_bf16_partials() -> None:
    q, k, v = (torch.randn(1, 20, 2, 8).bfloat16() for _ in range(3))
    halves = [attend(q, k[:, s], v[:, s], scale=0.3, backend=CPU) for s in (slice(9), slice(9, 20))]
    out = torch.full((1, 20, 2, 8), torch.nan)
    merge(halves, out=out)
    assert relative_error(out, reference_attention(q, k, v, scale=0.3)) <= 1e-2
    assert torch.equal(out.bfloat16(), merge(halves))


@pytest.mark.parametrize("shift", [-1e4, -500.0, 0.0, 500.0, 1e4])
def test_common_shift_of_lse_cancels_out(shift: float) -> None:
    """exp(lse) alone would be 0 or inf here."""
    first, second = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    low = torch.full((1, 2, 4), shift)
    out = merge([(first, low), (second, low + 2.0)])
    weight = 1.0 / (1.0 + math.exp(2.0))
    torch.testing.assert_close(out, weight * first + (1.0 - weight) * second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_keys(dtype: torch.dtype) -> None:
    """-inf in one partial leaves the other one exact; -inf in all of them gives 0, not nan."""
    full = torch.randn(2, 3, 4, 8).to(dtype)
    none = torch.zeros_like(full)
    lse = torch.randn(2, 4, 3)
    lse[:, :, 1] = -torch.inf
    empty = torch.full_like(lse, -torch.inf)
    full[:, 1] = 0.0
    for partials in (
        [(full, lse), (none, empty)],
        [(none, empty), (full, lse)],
        [(none, empty), (none, empty), (full, lse), (none, empty)],
    ):
        assert torch.equal(merge(partials), full)
    assert torch.equal(merge([(none, empty), (none, empty)]), none)
    assert torch.equal(merge([(none, empty)]), none)


def test_nan_is_not_hidden() -> None:
    out, lse = torch.randn(1, 3, 2, 8), torch.randn(1, 2, 3)
    bad_lse = lse.clone()
    bad_lse[0, 1, 2] = torch.nan
    merged = merge([(out, lse), (out, bad_lse)])
    assert merged[0, 2, 1].isnan().all()
    assert merged.isnan().sum() == 8


def test_one_partial_is_a_cast_copy() -> None:
    out = torch.randn(2, 3, 4, 8)
    merged = merge([(out, torch.empty(0))])
    assert torch.equal(merged, out) and merged.data_ptr() != out.data_ptr()
    half = torch.full((2, 4, 3, 8), torch.nan, dtype=torch.bfloat16).transpose(1, 2)
    assert torch.equal(merge([(out, torch.empty(0))], out=half), out.bfloat16())


def test_no_rows() -> None:
    partial = (torch.zeros(2, 0, 4, 8), torch.zeros(2, 4, 0))
    assert merge([partial, partial]).shape == (2, 0, 4, 8)


def test_refuses_what_does_not_fit() -> None:
    out, lse = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="partials must hold at least one"):
        merge([])
    with pytest.raises(ValueError, match=r"out must have the partials' shape \(2, 3, 4, 8\); got"):
        merge([(out, lse)], out=torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"partials\[1\] must be .* got out \(2, 3, 4, 4\)"):
        merge([(out, lse), (torch.zeros(2, 3, 4, 4), lse)])
    with pytest.raises(ValueError, match=r"partials\[1\] must be .* and lse \(2, 3, 4\)"):
        merge([(out, lse), (out, lse.transpose(1, 2))])
    with pytest.raises(ValueError, match=r"4 dims \[B, S, H, D\]; got \(3, 4, 8\)"):
        merge([(out[0], lse[0])])


def test_one_warning_if_the_compiled_part_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> native.Native:
        raise native.NativeUnavailable("it is missing; to build it: some command")

    monkeypatch.setattr(native, "load", load)
    merging._compiled.cache_clear()
    try:
        assert merging._compiled() is None and merging._compiled() is None
    finally:
        merging._compiled.cache_clear()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "to build it: some command" in record.getMessage()
