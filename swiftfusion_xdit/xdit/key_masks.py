"""Boolean masks of keys, as ranges of rows.

A key that no query attends need not travel: each rank leaves its masked rows at home, and any
attention kernel and schedule serves. For that the host must know the mask, so it is read from the
device once and remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from swiftfusion_xdit.xdit.key_rows import Ranges

MAX_REMEMBERED = 16


def is_key_mask(mask: Tensor) -> bool:
    """Whether a mask ``[b or 1, h or 1, s_q or 1, s_kv]`` is boolean and one for all queries."""
    return mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1


class KeyMasks:
    """Reads masks, and remembers the last ones. Holds those tensors, so that none is mistaken."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, tuple[Tensor, tuple[Ranges, ...]]] = OrderedDict()

    def of_mask(self, mask: Tensor) -> tuple[Ranges, ...] | None:
        """The rows that ``[b or 1, 1, 1, s_kv]`` keeps, by sample; None while a graph is captured,
        when no value can be read."""
        return self._read(mask, ("mask", tuple(mask.shape)))

    def of_indices(
        self, indices: Tensor, *, batch: int, num_rows: int
    ) -> tuple[Ranges, ...] | None:
        """The same for flat positions of valid keys in ``[batch, num_rows]``."""
        return self._read(indices, ("indices", batch, num_rows))

    def _read(self, tensor: Tensor, what: tuple[Hashable, ...]) -> tuple[Ranges, ...] | None:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        key = None if tensor.is_inference() else (*_identity(tensor), *what)
        if key is not None and key in self._known:
            self._known.move_to_end(key)
            return self._known[key][1]
        rows = _ranges(tensor, what)
        if key is not None:
            self._known[key] = (tensor, rows)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return rows


def _identity(tensor: Tensor) -> tuple[Hashable, ...]:
    """What stays the same as long as nobody has written to the tensor."""
    return tensor.device, tensor.data_ptr(), tensor._version, tensor.dtype, tensor.stride()


def _ranges(tensor: Tensor, what: tuple[Hashable, ...]) -> tuple[Ranges, ...]:
    if what[0] == "mask":
        keep = tensor.detach().reshape(tensor.shape[0], -1).cpu()
    else:
        _, batch, num_rows = what
        keep = dense_mask(tensor.detach().cpu(), batch=batch, num_rows=num_rows).flatten(1)  # type: ignore[arg-type]
    return tuple(_runs(sample) for sample in keep)


def _runs(keep: Tensor) -> Ranges:
    """Where a boolean vector is True, as ``(start, stop)``."""
    edges = torch.zeros(len(keep) + 2, dtype=torch.int8)
    edges[1:-1] = keep
    change = edges.diff()
    starts, stops = (change == 1).nonzero().flatten(), (change == -1).nonzero().flatten()
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def dense_mask(indices: Tensor, *, batch: int, num_rows: int) -> Tensor:
    """``[batch, 1, 1, num_rows]``, True at the flat positions in ``indices``."""
    keep = torch.zeros(batch * num_rows, dtype=torch.bool, device=indices.device)
    return keep.index_fill_(0, indices, True).view(batch, 1, 1, num_rows)
