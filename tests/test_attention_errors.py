"""Bad input to local attention is refused with an error that names argument, rule and values."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from swiftfusion_xdit.attention import Backend, attend, select_backend
from swiftfusion_xdit.attention.cpu import CpuBackend

CPU = select_backend("cpu", "cpu")


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_auto_is_chosen_by_device(device: torch.device | str) -> None:
    backend = select_backend("auto", device)
    assert isinstance(backend, Backend)
    assert backend.name == "cpu" and backend.has_lse


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, cpu.*; got 'fast'"):
        select_backend("fast", "cpu")


def test_backend_of_another_device() -> None:
    with pytest.raises(ValueError, match="'cpu' runs on device type 'cpu'; got device type 'meta'"):
        select_backend("cpu", "meta")


def test_device_that_no_backend_serves() -> None:
    with pytest.raises(NotImplementedError, match="local attention on device type 'meta'"):
        select_backend("auto", "meta")


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        (
            zeros(3, 4, 8),
            zeros(1, 3, 4, 8),
            zeros(1, 3, 4, 8),
            r"must have 4 dims \[B, S, H, D\]; got q \(3, 4, 8\)",
        ),
        (
            zeros(1, 3, 4, 8),
            zeros(1, 3, 4, 8),
            zeros(1, 2, 4, 8),
            r"k and v must have the same shape; .* k \(1, 3, 4, 8\), v \(1, 2, 4, 8\)",
        ),
        (
            zeros(2, 3, 4, 8),
            zeros(1, 3, 4, 8),
            zeros(1, 3, 4, 8),
            r"same batch size and head dim; got q \(2, 3, 4, 8\), k \(1, 3, 4, 8\)",
        ),
        (
            zeros(1, 3, 4, 16),
            zeros(1, 3, 4, 8),
            zeros(1, 3, 4, 8),
            r"same batch size and head dim; got q \(1, 3, 4, 16\)",
        ),
        (
            zeros(1, 3, 5, 8),
            zeros(1, 3, 2, 8),
            zeros(1, 3, 2, 8),
            r"multiple of the number of kv heads: 5 % 2 = 1",
        ),
        (
            zeros(1, 3, 2, 8),
            zeros(1, 3, 4, 8),
            zeros(1, 3, 4, 8),
            r"multiple of the number of kv heads: 2 % 4 = 2",
        ),
        (
            zeros(1, 3, 4, 8),
            zeros(1, 3, 0, 8),
            zeros(1, 3, 0, 8),
            r"number of heads and head dim must be at least 1; .* k \(1, 3, 0, 8\)",
        ),
        (
            zeros(1, 3, 4, 8),
            zeros(1, 3, 4, 8),
            zeros(1, 3, 4, 8, dtype=torch.bfloat16),
            r"same dtype; got q torch.float32, k torch.float32, v torch.bfloat16",
        ),
        (
            zeros(1, 3, 4, 8),
            zeros(1, 3, 4, 8, device="meta"),
            zeros(1, 3, 4, 8),
            r"one device of type 'cpu' for backend 'cpu'; got q cpu, k meta, v cpu",
        ),
        (
            *(zeros(1, 3, 4, 8, device="meta") for _ in range(3)),
            r"one device of type 'cpu' for backend 'cpu'; got q meta",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, scale=1.0, backend=CPU)


def test_dtype_that_is_not_supported() -> None:
    q = zeros(1, 3, 4, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"torch.float64 with backend 'cpu'; supported"):
        attend(q, q, q, scale=1.0, backend=CPU)


class _MultiplesOf8(CpuBackend):
    name: ClassVar[str] = "eights"
    head_dim_multiple = 8
    max_head_dim = 64


@pytest.mark.parametrize("head_dim", [12, 72])
def test_head_dim_that_is_not_supported(head_dim: int) -> None:
    q = zeros(1, 3, 4, head_dim)
    backend = _MultiplesOf8(torch.device("cpu"))
    message = f"head dim {head_dim} and backend 'eights'; supported: multiples of 8 up to 64"
    with pytest.raises(NotImplementedError, match=message):
        attend(q, q, q, scale=1.0, backend=backend)
