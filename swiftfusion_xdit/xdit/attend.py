"""One USP call, its arguments sorted out, on the kernels that can serve it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from swiftfusion_xdit.xdit import session as sessions
from swiftfusion_xdit.xdit.key_masks import dense_mask, is_key_mask
from swiftfusion_xdit.xdit.key_rows import KeyRows, Ranges, within
from swiftfusion_xdit.xdit.session import GATHER, MASKED, Session

# Names, in attention_kwargs, of tensors like the query that a backend wants for its heads.
EXTRA_INPUTS = "ulysses_extra_inputs"


@torch.library.custom_op("swiftfusion::attention", mutates_args=())
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: str,
    lengths: Sequence[int],
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """:func:`attend` as one node of a graph."""
    session = sessions.current()
    assert session is not None, "no runtime state of xDiT runs torus"
    return attend(session, query, key, value, kernel, lengths, mask=mask, indices=indices)


@attention_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: str,
    lengths: Sequence[int],
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    b, h, s, d = query.shape
    return query.new_empty(b, s, h, d).transpose(1, 2)


def attend(
    session: Session,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: str,
    lengths: Sequence[int],
    *,
    mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """``[b, h, s, d]`` of this rank's rows, as views of what the runtime takes and gives.

    Args:
        kernel: which local kernel, see :meth:`Session.kernel_for`.
        lengths: numbers, alike on every rank, that the lengths of all ranks follow from.
        mask: ``[b or 1, 1, s_q or 1, s_kv or 1]`` of the whole sequence: boolean, or added.
        indices: instead of a mask, flat positions of the valid keys in ``[b, s_kv]`` of the whole
            sequence.

    Raises:
        ValueError: a mask that does not fit keys of equal length on every rank.
    """
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if mask is None and indices is None:
        return _run(session, kernel, q, k, v, lengths).transpose(1, 2)
    kept = _kept_keys(session, k, mask, indices)
    if kept is not None:
        return _attend_kept(session, kernel, q, k, v, lengths, kept).transpose(1, 2)
    if mask is None:
        assert indices is not None
        mask = dense_mask(indices, batch=k.shape[0], num_rows=k.shape[1] * session.size)
    backend: Any = session.sequence_parallel(MASKED).backend
    backend.mask = mask
    try:
        return _run(session, MASKED, q, k, v, lengths).transpose(1, 2)
    finally:
        backend.mask = None


def _kept_keys(
    session: Session, k: Tensor, mask: Tensor | None, indices: Tensor | None
) -> tuple[Ranges, ...] | None:
    """The keys of all ranks that count, by sample, if they are the same for all queries."""
    num_rows = k.shape[1] * session.size
    if mask is None:
        assert indices is not None
        return session.key_masks.of_indices(indices, batch=k.shape[0], num_rows=num_rows)
    if mask.shape[3] not in (1, num_rows):
        raise ValueError(
            f"attn_mask must cover the keys of all ranks, {k.shape[1]} rows * {session.size} "
            f"ranks = {num_rows}, got shape {tuple(mask.shape)}"
        )
    if not is_key_mask(mask) or mask.shape[3] != num_rows:
        return None
    return session.key_masks.of_mask(mask)


def _attend_kept(
    session: Session,
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    kept: tuple[Ranges, ...],
) -> Tensor:
    """With those of all ranks' keys that ``kept`` names, the same for all samples or by sample."""
    num_rows = k.shape[1]
    start = session.rank * num_rows
    if len(set(kept)) == 1:
        kept = kept[:1]
    outs = []
    for sample, ranges in enumerate(kept):
        one = slice(None) if len(kept) == 1 else slice(sample, sample + 1)
        rows = KeyRows.of(num_rows, within(ranges, start, start + num_rows))
        keys, values = (rows.select(x[one].transpose(1, 2)).transpose(1, 2) for x in (k, v))
        outs.append(_run(session, kernel, q[one], keys, values, (*lengths, ranges)))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@torch.compiler.disable
def attend_opaque(
    session: Session,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: str,
    attention_kwargs: dict[str, Any],
    lengths: Sequence[int],
) -> Tensor:
    """With xDiT's own function, which may read any of ``attention_kwargs``.

    Under torch.compile a graph break: what those functions read has no place in a graph.
    """
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    backend: Any = session.sequence_parallel(kernel).backend
    backend.attention_kwargs, backend.num_calls = attention_kwargs or None, 0
    backend.extra_inputs = {
        name: _gather_heads(session, attention_kwargs[name].transpose(1, 2))
        for name in attention_kwargs.get(EXTRA_INPUTS) or ()
        if attention_kwargs.get(name) is not None
    }
    try:
        return _run(session, kernel, q, k, v, lengths).transpose(1, 2)
    finally:
        backend.attention_kwargs, backend.extra_inputs = None, {}


def _gather_heads(session: Session, rows: Tensor) -> list[Tensor]:
    """All ranks' rows of ``[b, s, h, d]`` for this rank's heads, a tensor a head group."""
    gather = session.sequence_parallel(GATHER)
    backend: Any = gather.backend
    backend.groups = []
    _run(session, GATHER, rows, rows[:, :, :1], rows[:, :, :1], ())
    assert gather.plan is not None
    # A GPU may have run the layer once more before, to load its kernels.
    groups, backend.groups = backend.groups[-gather.plan.schedule.groups_per_rank :], []
    return groups


def _run(
    session: Session, kernel: str, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[Hashable]
) -> Tensor:
    sequence_parallel = session.sequence_parallel(kernel)
    if session.report is None:
        return sequence_parallel.attention(q, k, v, lengths=tuple(lengths))
    with session.report.torus_call(sequence_parallel):
        return sequence_parallel.attention(q, k, v, lengths=tuple(lengths))
