"""Random attention inputs for tests: shapes and layouts drawn by hypothesis, values by a seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from swiftfusion_xdit.attention.reference import reference_attention

LAYOUTS = ("bshd", "bhsd", "sbhd", "fused", "padded", "every_other_row", "dim_strided")


@dataclass(frozen=True)
class Case:
    """All that makes the inputs: shape, dtype, layout of q (k and v have the next ones), seed."""

    batch: int
    num_rows: int
    num_keys: int
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    layout: str
    seed: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def tolerance(self) -> float:
        """Relative error allowed to a kernel."""
        return {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[self.dtype]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        first = LAYOUTS.index(self.layout)
        q_shape = (self.batch, self.num_rows, self.num_heads, self.head_dim)
        kv_shape = (self.batch, self.num_keys, self.num_kv_heads, self.head_dim)
        shapes = (q_shape, kv_shape, kv_shape)
        q, k, v = (
            in_layout(
                torch.randn(shape, generator=rng).to(self.dtype),
                LAYOUTS[(first + idx) % len(LAYOUTS)],
            )
            for idx, shape in enumerate(shapes)
        )
        return q, k, v


def cases(
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    max_rows: int = 260,
) -> st.SearchStrategy[Case]:
    lengths = st.sampled_from((1, 2, 3, 31, 64, 127)) | st.integers(1, max_rows)
    return st.builds(
        Case,
        batch=st.integers(1, 3),
        num_rows=lengths,
        num_keys=lengths,
        num_kv_heads=st.integers(1, 4),
        group=st.integers(1, 3),
        head_dim=st.sampled_from((8, 20, 40, 64, 128)),
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 2**31),
    )


def in_layout(x: Tensor, layout: str) -> Tensor:
    """A view equal to x [B, S, H, D] inside other memory; what x does not cover there is nan."""
    batch, num_rows, num_heads, head_dim = x.shape

    def nans(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype)

    view = {
        "bshd": lambda: nans(batch, num_rows, num_heads, head_dim),
        "bhsd": lambda: nans(batch, num_heads, num_rows, head_dim).transpose(1, 2),
        "sbhd": lambda: nans(num_rows, batch, num_heads, head_dim).transpose(0, 1),
        "fused": lambda: nans(batch, num_rows, 3, num_heads, head_dim)[:, :, 1],
        "padded": lambda: nans(batch, num_rows + 2, num_heads + 1, head_dim + 3)[:, 1:-1, 1:, 2:-1],
        "every_other_row": lambda: nans(batch, 2 * num_rows, num_heads, head_dim)[:, ::2],
        "dim_strided": lambda: nans(batch, num_rows, head_dim, num_heads).transpose(2, 3),
    }[layout]()
    return view.copy_(x)


def reference_lse(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """log sum exp of the scaled scores [B, H, S_q] in float64, written by torch.logsumexp."""
    keys = k.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = scale * torch.einsum("bshd,bthd->bhst", q.double(), keys)
    return torch.logsumexp(scores, dim=-1)


def reference(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference_attention(q, k, v, scale=case.scale)
