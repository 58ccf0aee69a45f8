"""What the steps of a schedule cost on one GPU, in microseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from swiftfusion_xdit.simulate.hardware import BYTES_PER_US, Gpu

TILE_ROWS = 128  # query rows that one unit of a GPU attends at a time
LSE_BYTES = 4
FLOPS_PER_US = 1e6  # of one TFLOP/s


@dataclass(frozen=True)
class Costs:
    """Durations on ``gpu``.

    An attention call is whole waves of tiles: ``num_units`` tiles of 128 query rows of one head
    run at a time, and the last wave takes as long as a full one. Copies and merges take their
    bytes over the memory's bandwidth. ``free_compute`` makes all of that take no time.

    ``merge_passes`` multiplies the bytes of a merge: 1 for a fused kernel that reads every partial
    once; an unfused one in fp32 passes over its operands several times.
    """

    gpu: Gpu
    merge_passes: float = 1.0
    free_compute: bool = False

    def attend_us(
        self, *, query_rows: int, key_rows: int, num_heads: int, head_dim: int, batch: int = 1
    ) -> float:
        """One attention call over ``num_heads`` heads."""
        if self.free_compute or not query_rows * key_rows * num_heads:
            return 0.0
        tiles = math.ceil(query_rows / TILE_ROWS) * num_heads * batch
        waves = math.ceil(tiles / self.gpu.num_units)
        flops_per_wave = 4.0 * TILE_ROWS * key_rows * head_dim * self.gpu.num_units
        rate = self.gpu.attention_rate(head_dim) * FLOPS_PER_US
        return self.gpu.kernel_us + waves * flops_per_wave / rate

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
