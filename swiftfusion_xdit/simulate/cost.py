"""What the steps of a schedule cost on one GPU, in microseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swiftfusion_xdit.simulate.hardware import BYTES_PER_US, Gpu

# Of what one attention call leaves idle, what another gets. The schedules that two H100 ran are met
# within 6 % in the mean, nearly always too fast; with 0.9 more so.
FILLED = 0.4
LSE_BYTES = 4
FLOPS_PER_US = 1e6  # of one TFLOP/s
WARP_GROUP_ROWS = 64  # of a tile, on Hopper


def tile_rows(head_dim: int) -> int:
    """Query rows that one unit of a GPU attends at a time, as FlashAttention cuts on Hopper."""
    return 192 if head_dim <= 64 else 128


def tiles_per_head(*, query_rows: int, head_dim: int, batch: int) -> int:
    """Tiles that the query rows of every sample are cut into, for one head."""
    return math.ceil(query_rows / tile_rows(head_dim)) * batch


def worked_rows(*, query_rows: int, head_dim: int, fused: bool) -> int:
    """The rows that tiles take time for, of one head and sample: whole tiles.

    Of a fused call's last tile only the warp groups with rows work.
    """
    step = WARP_GROUP_ROWS if fused else tile_rows(head_dim)
    return math.ceil(query_rows / step) * step


@dataclass(frozen=True)
class Costs:
    """Durations on ``gpu``.

    An attention call is whole waves of tiles: ``num_units`` tiles of some query rows of one head
    run at a time, and the last wave takes as long as a full one; of what it leaves idle another
    call gets a part. Copies and merges take their
    bytes over the memory's bandwidth. ``free_compute`` makes all of that take no time.

    ``merge_passes`` multiplies the bytes of a merge: 1 for a fused kernel that reads every partial
    once; an unfused one in fp32 passes over its operands several times.
    """

    gpu: Gpu
    merge_passes: float = 1.0
    free_compute: bool = False

    def attend_us(
        self,
        *,
        query_rows: int,
        key_rows: int,
        num_heads: int,
        head_dim: int,
        batch: int = 1,
        fused: bool = False,
    ) -> float:
        """One attention call over ``num_heads`` heads."""
        if self.free_compute or not query_rows * key_rows * num_heads:
            return 0.0
        waves = self.waves(
            query_rows=query_rows, num_heads=num_heads, head_dim=head_dim, batch=batch, fused=fused
        )
        wave_us = self.wave_us(key_rows=key_rows, head_dim=head_dim)
        return self.gpu.kernel_us + math.ceil(waves) * wave_us

    def wave_us(self, *, key_rows: int, head_dim: int) -> float:
        """A tile on every unit, with its keys."""
        if self.free_compute:
            return 0.0
        flops = 4.0 * self.rows_per_wave(head_dim) * key_rows * head_dim
        return flops / (self.gpu.attention_rate(head_dim) * FLOPS_PER_US)

    def waves(
        self,
        *,
        query_rows: int,
        num_heads: int,
        head_dim: int,
        batch: int = 1,
        fused: bool = False,
    ) -> float:
        """How often the tiles of an attention call fill all units."""
        rows = worked_rows(query_rows=query_rows, head_dim=head_dim, fused=fused)
        return rows * batch * num_heads / self.rows_per_wave(head_dim)

    def rows_per_wave(self, head_dim: int) -> int:
        """A tile on every unit."""
        return tile_rows(head_dim) * self.gpu.num_units

    def width(
        self,
        *,
        query_rows: int,
        num_heads: int,
        head_dim: int,
        batch: int = 1,
        fused: bool = False,
    ) -> float:
        """The part of the GPU that another attention call does not get, on average."""
        waves = self.waves(
            query_rows=query_rows, num_heads=num_heads, head_dim=head_dim, batch=batch, fused=fused
        )
        return 1.0 - FILLED * (1.0 - waves / math.ceil(waves)) if waves else 1.0

    def copy_us(self, num_bytes: float) -> float:
        """Copy ``num_bytes`` inside the GPU: each is read and written."""
        if self.free_compute or not num_bytes:
            return 0.0
        return self.gpu.kernel_us + self.stream_us(2 * num_bytes)

    def merge_us(self, *, out_bytes: float, num_partials: int, lse_rows: float) -> float:
        """Merge partial outputs of ``out_bytes`` each; ``lse_rows`` is rows times heads."""
        if self.free_compute or not out_bytes:
            return 0.0
        touched = (num_partials + 1) * out_bytes + num_partials * lse_rows * LSE_BYTES
        return self.gpu.kernel_us + self.stream_us(self.merge_passes * touched)

    def stream_us(self, touched_bytes: float) -> float:
        """Read or write that many bytes."""
        return touched_bytes / (self.gpu.memory_gb_per_s * BYTES_PER_US)
