"""Rows, heads and bytes of a schedule's blocks for one layer's shape, without tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from swiftfusion_xdit.mesh import Mesh, head_group_sizes, split_counts
from swiftfusion_xdit.schedule.steps import Block
from swiftfusion_xdit.simulate.hardware import require_positive


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one attention layer over a whole group.

    Rank p brings ``query_lengths[p]`` rows of ``num_heads`` heads and ``key_lengths[p]`` rows of
    ``num_kv_heads`` heads; elements have ``itemsize`` bytes.
    """

    batch: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int = 2

    def __post_init__(self) -> None:
        require_positive(
            "layer shape",
            batch=self.batch,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            itemsize=self.itemsize,
        )
        if len(self.query_lengths) != len(self.key_lengths) or not self.query_lengths:
            raise ValueError(
                "layer shape: query_lengths and key_lengths must name the same ranks, got "
                f"{len(self.query_lengths)} and {len(self.key_lengths)} lengths"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "layer shape: num_kv_heads must divide num_heads, got "
                f"{self.num_kv_heads} and {self.num_heads}"
            )

    @classmethod
    def even(
        cls, num_ranks: int, *, sequence: int, num_heads: int, head_dim: int, batch: int = 1
    ) -> LayerShape:
        """Self-attention of ``sequence`` rows, split over the ranks as evenly as rows allow."""
        lengths = tuple(split_counts(sequence, num_ranks))
        return cls(batch, lengths, lengths, num_heads, num_heads, head_dim)

    @property
    def is_even(self) -> bool:
        """Whether every rank brings the same number of rows."""
        return len(set(self.query_lengths)) == 1 and len(set(self.key_lengths)) == 1

    @property
    def flops(self) -> float:
        """Of the whole layer, over all ranks: two products of 2 S_q S_kv D a head."""
        pairs = sum(self.query_lengths) * sum(self.key_lengths)
        return 4.0 * self.batch * self.num_heads * self.head_dim * pairs


@dataclass(frozen=True)
class BlockSizes:
    """A layer's shape on a mesh whose ranks work through ``groups_per_rank`` head groups each.

    ``edge_heads``: of the first and the last group, see ``mesh.head_group_sizes``.
    """

    shape: LayerShape
    mesh: Mesh
    groups_per_rank: int = 1
    edge_heads: int = 0

    def __post_init__(self) -> None:
        self.mesh.require(num_ranks=len(self.shape.query_lengths), num_heads=self.shape.num_heads)

    @cached_property
    def head_ranges(self) -> tuple[range, ...]:
        """The query heads of every group."""
        fine: list[range] = []
        start = 0
        for coarse in split_counts(self.shape.num_heads, self.mesh.num_head_groups):
            for count in head_group_sizes(coarse, self.groups_per_rank, edge_heads=self.edge_heads):
                fine.append(range(start, start + count))
                start += count
        return tuple(fine)

    def num_heads(self, tensor: str, heads: int) -> int:
        """Heads of a group in a tensor: for k and v those that its query heads share."""
        query_heads = self.head_ranges[heads]
        if tensor in ("q", "o") or not query_heads:
            return len(query_heads)
        shared_by = self.shape.num_heads // self.shape.num_kv_heads
        return query_heads[-1] // shared_by - query_heads[0] // shared_by + 1

    def rows(self, tensor: str, chunks: Sequence[int]) -> int:
        shape = self.shape
        lengths = shape.query_lengths if tensor in ("q", "o") else shape.key_lengths
        return sum(lengths[chunk] for chunk in chunks)

    def block_bytes(self, block: Block) -> int:
        """What one put of ``block`` moves."""
        shape = self.shape
        rows = self.rows(block.tensor, (block.chunk,))
        heads = self.num_heads(block.tensor, block.heads)
        return shape.batch * rows * heads * shape.head_dim * shape.itemsize

    @property
    def is_even(self) -> bool:
        """Whether every rank has the same rows and heads, so that ranks can stand for others."""
        even_heads = self.shape.num_heads % self.mesh.num_head_groups == 0
        even_groups = self.shape.num_kv_heads % self.mesh.num_head_groups == 0
        return self.shape.is_even and even_heads and even_groups
