"""Attention over a group against the fp64 oracle: cases, how ranks run them, what they return."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.sequence_parallel import SequenceParallel

LAYOUTS = ("BSHD", "BHSD", "padded")


@dataclass(frozen=True)
class Case:
    """One attention layer; equal cases draw equal inputs on every rank."""

    mesh: Mesh
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    schedule: str = "torus"
    strategy: str = "torus"
    machines: int = 1
    batch: int = 1
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "BSHD"
    scale: float | None = None
    seed: int = 0
    wire: str = "exact"
    groups: int | None = None

    def full_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the whole sequence, [B, S, H, D], rounded to the case's dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = (
            (sum(self.query_lengths), self.num_heads),
            (sum(self.key_lengths), self.num_kv_heads),
            (sum(self.key_lengths), self.num_kv_heads),
        )
        q, k, v = (
            torch.randn(self.batch, rows, heads, self.head_dim, generator=generator).to(self.dtype)
            for rows, heads in sizes
        )
        return q, k, v

    def open(self) -> SequenceParallel:
        return SequenceParallel(
            strategy=self.strategy,
            machines=self.machines,
            mesh=self.mesh,
            schedule=self.schedule,
            groups=self.groups,
            wire=self.wire,
        )

    def error(self, sp: SequenceParallel, rank: int) -> float:
        """Relative error of this rank's rows; poison around strided inputs must not leak in."""
        q, k, v = self.full_inputs()
        mine = [
            laid_out(whole.split(lengths, dim=1)[rank], self.layout)
            for whole, lengths in (
                (q, self.query_lengths),
                (k, self.key_lengths),
                (v, self.key_lengths),
            )
        ]
        out = sp.attention(*mine, scale=self.scale)
        rows = q.split(self.query_lengths, dim=1)[rank]
        assert out.shape == rows.shape and out.dtype == rows.dtype and out.is_contiguous()
        if not rows.numel():
            return 0.0
        return relative_error(out, reference_attention(rows, k, v, scale=self.scale))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides: head-major, or inside a tensor of NaN."""
    if layout == "BHSD":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        batch, rows, heads, dim = tensor.shape
        around = torch.full((batch, rows + 2, heads + 1, dim), torch.nan, dtype=tensor.dtype)
        inside = around[:, 1 : rows + 1, :heads]
        return inside.copy_(tensor)
    return tensor.contiguous()


def run_cases(rank: int, world_size: int, cases: list[Case], repeats: int = 1) -> float:
    """The worst error of cases that share one `SequenceParallel`, each on fresh inputs."""
    worst = 0.0
    with cases[0].open() as sp:
        for repeat in range(repeats):
            for case in cases:
                fresh = replace(case, seed=case.seed + 1000 * repeat)
                worst = max(worst, fresh.error(sp, rank))
    return worst


def uneven(total: int, parts: int) -> tuple[int, ...]:
    """Lengths that differ by one, larger first."""
    size, larger = divmod(total, parts)
    return tuple(size + (i < larger) for i in range(parts))
