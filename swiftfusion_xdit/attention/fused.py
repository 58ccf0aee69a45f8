"""What a fused call is told: where other ranks' keys lie, and the flags that say they came.

The kernel's last block gives the slots back: it clears what said that rows were there, then tells
their writers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

CHUNK_BITS = 16  # of an entry of ``begins``


@dataclass(frozen=True)
class RemoteKeys:
    """Keys and values that peers are still writing while the kernel runs.

    They stand before the rank's own ones, and the kernel takes all from the last row to the first.

    Args:
        k, v: addresses of contiguous arrays ``[B, num_rows, H_kv, D]``.
        num_rows: a multiple of ``tile_rows``.
        num_keys: of all ranks: ``num_rows`` and those that the call is given as its own.
        begins: int32 ``[num_rows / tile_rows]``. Which chunks of rows the walk meets first in a
            tile: the number of the first one, and from bit ``CHUNK_BITS`` on how many. 0: none.
        flags: int64 ``[chunks, H_kv, 2]``: address of the uint32 that a peer sets when the rows of
            a chunk are there for a head, and the flag's name for the watchdog, see ``heartbeat``.
        counter: int32 ``[1]``, 0: how many blocks of the kernel have read all that they read.
        clears: int64: addresses of uint32 that the last of them sets to 0.
        frees: int64: addresses of uint32 at the writers that it then sets to 1.
        note: address of a uint32 in host memory; gets the name of a flag that is not set in time.
        deadline_ns: how long the kernel waits for a flag before it stops all work of its GPU.
        behind_puts: whether the kernel before it on its stream is `sf_put`. It starts when all
            blocks of that one have started, and ends after it.
    """

    k: int
    v: int
    num_rows: int
    num_keys: int
    begins: Tensor
    flags: Tensor
    counter: Tensor
    clears: Tensor
    frees: Tensor
    note: int
    deadline_ns: int
    behind_puts: bool = False
