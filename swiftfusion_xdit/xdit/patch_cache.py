"""Keys and values that PipeFusion keeps of the patches not at hand.

xDiT updates its cache after the exchange, where each rank has all rows of some heads. Here it is
updated before: each rank keeps its own rows of every patch, all heads. What is attended is the
same, and the runtime needs no cache.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor


class PatchCache:
    """This rank's rows ``[b, h, s, d]`` of keys and values, by attention layer."""

    def __init__(self) -> None:
        self._rows: WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def update(self, layer: Any, key: Tensor, value: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """All rows of the layer, those at hand replaced.

        Args:
            state: xDiT's runtime state, which knows the patch at hand.

        Raises:
            ValueError: the rows are not those of the patch, or no full pass came before.
        """
        if not state.patch_mode:
            # Later patches are written into these, so they must be this cache's own.
            rows = key.clone(), value.clone()
            self._rows[layer] = rows
            return rows
        starts = state.pp_patches_token_start_idx_local
        start, stop = starts[state.pipeline_patch_idx], starts[state.pipeline_patch_idx + 1]
        if layer not in self._rows:
            raise ValueError("a patch needs a full pass before it, and this layer has seen none")
        keys, values = self._rows[layer]
        if key.shape[2] != stop - start or stop > keys.shape[2]:
            raise ValueError(
                f"patch {state.pipeline_patch_idx} has local rows {start} to {stop} of "
                f"{keys.shape[2]}, got {key.shape[2]} key rows"
            )
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
        return keys, values
