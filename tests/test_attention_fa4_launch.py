"""Launches of FA4 are noted on the first call of a kind, and repeated without its function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit.attention.cpu import CpuBackend
from swiftfusion_xdit.attention.fa4_launch import Launches


class FakeFunction:
    """Like the package's: decides by shape, keeps what it compiled in a table, calls an entry."""

    def __init__(self, *, calls: int = 1, named: bool = False) -> None:
        self.compile_cache: dict[Any, Any] = {}
        self.num_calls = 0
        self.num_launches = 0
        self._calls, self._named = calls, named

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        return_lse: bool,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        assert return_lse
        self.num_calls += 1
        key = (q.dtype, q.shape[3])
        if key not in self.compile_cache:
            self.compile_cache[key] = self._kernel
        for _ in range(self._calls):
            if self._named:
                self.compile_cache[key](q, k, v, out, lse, scale=softmax_scale, rest=None)
            else:
                self.compile_cache[key](q, k, v.detach(), out.detach(), lse, softmax_scale, None)

    def _kernel(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, rest: None
    ) -> None:
        self.num_launches += 1
        result, found = CpuBackend(torch.device("cpu")).forward(q, k, v, scale)
        out.copy_(result)
        lse.copy_(found)


def inputs(rows: int = 5, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, rows, heads, 8).unbind()
    return q, k, v


def check(launches: Launches, q: Tensor, k: Tensor, v: Tensor, scale: float = 0.3) -> None:
    out, lse = launches.run(q, k, v, scale, None)
    wanted, wanted_lse = CpuBackend(torch.device("cpu")).forward(q, k, v, scale)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


def test_later_calls_of_a_kind_skip_the_function() -> None:
    function = FakeFunction()
    launches = Launches(function)
    for _ in range(3):
        check(launches, *inputs())
    assert (function.num_calls, function.num_launches) == (1, 3)
    assert function.compile_cache.keys() == {(torch.float32, 8)}, "the table must be back in place"


@pytest.mark.parametrize("change", ["rows", "strides", "scale"])
def test_another_kind_asks_the_function_again(change: str) -> None:
    function = FakeFunction()
    launches = Launches(function)
    check(launches, *inputs())
    if change == "rows":
        check(launches, *inputs(rows=6))
    elif change == "strides":
        check(launches, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs()))
    else:
        check(launches, *inputs(), scale=0.5)
    assert function.num_calls == 2


@pytest.mark.parametrize("function", [FakeFunction(calls=2), FakeFunction(named=True)])
def test_what_is_not_understood_goes_through_the_function(function: FakeFunction) -> None:
    launches = Launches(function)
    for _ in range(3):
        check(launches, *inputs())
    assert function.num_calls == 3


def test_tensors_that_cannot_be_told_apart_go_through_the_function() -> None:
    function = FakeFunction()
    launches = Launches(function)
    for _ in range(2):
        x = inputs()[0]
        check(launches, x, x, x)
    assert function.num_calls == 2


def test_a_function_without_a_table_is_called() -> None:
    inner = FakeFunction()
    num_calls = []

    def function(*tensors: Tensor, **options: Any) -> None:
        num_calls.append(1)
        inner(*tensors, **options)

    launches = Launches(function)
    for _ in range(2):
        check(launches, *inputs())
    assert len(num_calls) == 2


def test_the_table_is_back_after_an_error() -> None:
    function = FakeFunction()
    table = function.compile_cache
    q, k, _ = inputs()
    with pytest.raises((RuntimeError, ValueError)):
        Launches(function).run(q, k, inputs(rows=6)[2][..., :3], 0.3, None)
    assert function.compile_cache is table


def test_find_tells_what_run_repeats() -> None:
    function = FakeFunction()
    launches = Launches(function)
    q, k, v = inputs()
    out, lse = torch.empty_like(q), torch.empty(1, 2, 5)
    launch = launches.find(q, k, v, 0.3, out, lse)
    assert launch is not None
    launch(*inputs(), out, lse)
    check(launches, q, k, v)
    assert function.num_calls == 1
