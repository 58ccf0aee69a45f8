"""The CPU backend: out and lse against the oracle for any shape, layout, dtype and GQA group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from swiftfusion_xdit.attention import attend, select_backend
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from tests.attention_cases import LAYOUTS, Case, cases, in_layout, reference, reference_lse

CPU = select_backend("cpu", "cpu")
COPIES = ("clone", "copy_", "contiguous", "_to_copy", "stack", "cat")


@settings(max_examples=200)
@given(case=cases())
@example(Case(1, 1, 1, 1, 1, 8, torch.float32, "bshd", 0))
@example(Case(2, 127, 1025, 1, 3, 40, torch.float32, "fused", 1))
@example(Case(1, 600, 1300, 2, 1, 128, torch.bfloat16, "bhsd", 2))
def test_out_and_lse_match_the_oracle(case: Case) -> None:
    q, k, v = case.tensors()
    out, lse = attend(q, k, v, scale=case.scale, backend=CPU)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (case.batch, case.num_heads, case.num_rows) and lse.dtype == torch.float32
    assert relative_error(out, reference(case, q, k, v)) <= case.tolerance
    lse_error = (lse - reference_lse(q, k, scale=case.scale)).abs().max().item()
    assert lse_error <= (5e-6 if case.dtype == torch.float32 else 3e-4)


@settings(max_examples=20)
@given(case=cases(max_rows=40))
def test_result_is_fresh_memory_and_inputs_are_untouched(case: Case) -> None:
    q, k, v = case.tensors()
    before = [x.clone() for x in (q, k, v)]
    out, lse = attend(q, k, v, scale=case.scale, backend=CPU)
    out.fill_(7.0)
    lse.fill_(7.0)
    for x, copy in zip((q, k, v), before, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_copy_where_the_kernel_takes_the_strides(layout: str, group: int) -> None:
    case = Case(1, 9, 11, 3, group, 8, torch.float32, "bshd", 5)
    q, k, v = (in_layout(x, layout) for x in case.tensors())
    with _Ops() as ops:
        attend(q, k, v, scale=case.scale, backend=CPU)
    names = [name for name, _ in ops.calls]
    assert names.count("_scaled_dot_product_flash_attention_for_cpu") == 1
    # The lse, as small as one head dim, may be copied.
    lse_numel = case.num_heads * case.num_rows
    copied = [numel for name, numel in ops.calls if name in COPIES and numel != lse_numel]
    expected = [x.numel() for x in (q, k, v)] if layout == "dim_strided" else []
    assert copied == expected, (layout, group, ops.calls)


def test_rows_that_overlap() -> None:
    """Every row the same memory (expand), and every row shifted by less than a row."""
    memory = torch.randn(500)
    expanded = torch.randn(2, 1, 4, 16).expand(2, 30, 4, 16)
    shifted = memory.as_strided((2, 30, 4, 16), (100, 7, 5, 1))
    plain = torch.randn(2, 30, 4, 16)
    for q, k, v in ((expanded, shifted, plain), (plain, expanded, shifted), (shifted,) * 3):
        out, _ = attend(q, k, v, scale=0.25, backend=CPU)
        assert relative_error(out, reference_attention(q, k, v)) <= 1e-6


def test_expanded_batch_and_heads_need_no_memory() -> None:
    q, k = torch.randn(3, 30, 4, 16), torch.randn(1, 20, 1, 16).expand(3, 20, 4, 16)
    out, _ = attend(q, k, k, scale=0.25, backend=CPU)
    assert relative_error(out, reference_attention(q, k, k)) <= 1e-6


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_lse_far_outside_the_range_of_exp(sign: float) -> None:
    """Scores near +-4000, where exp over- and underflows, keep finite and right results."""
    q, v = torch.full((1, 5, 2, 16), sign * 30.0), torch.randn(1, 40, 2, 16)
    k = 33.0 + 0.01 * torch.randn(1, 40, 2, 16)
    out, lse = attend(q, k, v, scale=0.25, backend=CPU)
    # A score of 4000 has an fp32 spacing of 2.4e-4 and is a sum of 16 roundings.
    assert relative_error(out, reference_attention(q, k, v)) <= 1e-2
    assert torch.allclose(lse.double(), reference_lse(q, k, scale=0.25), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.7])
def test_any_scale(scale: float) -> None:
    q, k, v = (torch.randn(2, n, 4, 8) for n in (7, 12, 12))
    out, lse = attend(q, k, v, scale=scale, backend=CPU)
    assert relative_error(out, reference_attention(q, k, v, scale=scale)) <= 2e-6
    assert torch.allclose(lse.double(), reference_lse(q, k, scale=scale), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(5, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_empty_queries_or_keys(
    num_rows: int, num_keys: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    q = torch.randn(2, num_rows, 4, 8).to(dtype)
    k = torch.randn(2, num_keys, num_kv_heads, 8).to(dtype)
    out, lse = attend(q, k, k, scale=1.0, backend=CPU)
    assert torch.equal(out, torch.zeros(2, num_rows, 4, 8, dtype=dtype))
    assert torch.equal(lse, torch.full((2, 4, num_rows), -torch.inf))


def test_empty_batch() -> None:
    q = torch.randn(0, 3, 4, 8)
    out, lse = attend(q, q, q, scale=1.0, backend=CPU)
    assert out.shape == (0, 3, 4, 8) and lse.shape == (0, 4, 3)


class _Ops(TorchDispatchMode):
    """Names of the operators that run inside, with the numbers of elements they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        numel = result.numel() if isinstance(result, torch.Tensor) else 0
        self.calls.append((func.overloadpacket.__name__, numel))
        return result
