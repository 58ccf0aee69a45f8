"""Calls of xDiT's USP, sent through Torus Attention.

Every model calls the one function ``xfuser.model_executor.layers.usp.USP``, some through
references taken long before; giving that function object another ``__code__`` reaches them all.
"""

from __future__ import annotations

import logging
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from swiftfusion_xdit.xdit import compat
from swiftfusion_xdit.xdit.attend import attend, attend_opaque, attention_op
from swiftfusion_xdit.xdit.key_rows import KeyRows, share, valid_rows
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import OPAQUE, Session
from swiftfusion_xdit.xdit.support import is_sparse, unsupported

logger = logging.getLogger(__name__)

_session: Session | None = None
_original: FunctionType | None = None


def install(usp: ModuleType, session: Session, patches: Patches) -> None:
    """Send the calls of ``usp.USP`` through ``session``; ``patches`` undoes it."""
    global _session, _original
    function = usp.USP
    problems = compat.check_usp(usp)
    assert not problems, problems
    _original = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    _session = session
    patches.set(function, "__code__", _usp.__code__)


def uninstall() -> None:
    """Forget the session; undoing the patches gives USP its own code back."""
    global _session, _original
    _session = _original = None


def _usp(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: Any,
    is_causal: Any,
    joint_query: Any,
    joint_key: Any,
    joint_value: Any,
    joint_strategy: Any,
    attn_layer: Any,
    combine_qkv_a2a: Any,
    backend: Any,
    attention_kwargs: Any,
    head_balance_layer: Any,
    kv_head_repeat: Any,
) -> Any:
    # This code runs as USP, in the namespace of xDiT's module and with USP's own defaults: it can
    # name nothing of this module but by importing it.
    from swiftfusion_xdit.xdit.dispatch import dispatch

    return dispatch(
        query,
        key,
        value,
        dropout_p=dropout_p,
        is_causal=is_causal,
        joint_query=joint_query,
        joint_key=joint_key,
        joint_value=joint_value,
        joint_strategy=joint_strategy,
        attn_layer=attn_layer,
        combine_qkv_a2a=combine_qkv_a2a,
        backend=backend,
        attention_kwargs=attention_kwargs,
        head_balance_layer=head_balance_layer,
        kv_head_repeat=kv_head_repeat,
    )


def dispatch(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """One USP call: ``query [b, h, s_q, d]``, ``key, value [b, h_kv, s_kv, d]``, this rank's rows.

    Returns:
        ``[b, h, s_q (+ joint), d]``, the order of rows that xDiT's USP gives.

    Raises:
        NotImplementedError: an argument that the strategy does not support, with
            ``--sp-fallback error``.
        ValueError: joint_strategy, kv_head_repeat, a mask or a length do not fit the tensors.
    """
    session = _session
    assert session is not None and _original is not None
    reason = unsupported(session, query, arguments)
    if reason is not None:
        if session.options.fallback == "error":
            raise NotImplementedError(
                f"{session.options.flag} does not support {reason}; --sp-fallback usp sends such "
                "calls through xDiT's own path, --sp-strategy usp all calls"
            )
        _warn_once(reason)
        return _original(query, key, value, **arguments)
    _check_kv_heads(query, key, arguments["kv_head_repeat"])
    kernel = session.kernel_for(arguments["backend"], query.device.type)
    assert kernel is not None
    kwargs = arguments["attention_kwargs"] or {}
    # With one patch the cache that xDiT keeps for PipeFusion is what went in just now.
    if session.state.num_pipeline_patch > 1 and session.has_patch_cache(arguments["attn_layer"]):
        key, value = session.patch_cache.update(arguments["attn_layer"], key, value, session.state)
    lengths: list[int] = []
    # A sparse kernel goes by where rows lie: it gets the rows that a correction would take out.
    rows = None if is_sparse(kernel) else session.key_rows
    key, value = _keys_that_count(session, rows, key, value, kwargs, lengths)
    if arguments["joint_strategy"]:
        query, key, value = join(session, query, key, value, arguments)
        lengths.append(arguments["joint_key"].shape[2])
    if kernel.startswith(OPAQUE):
        return attend_opaque(session, query, key, value, kernel, kwargs, lengths)
    mask, indices = kwargs.get("attn_mask"), kwargs.get("indices_k")
    if torch.compiler.is_compiling():
        return attention_op(query, key, value, kernel, lengths, mask, indices)
    # Outside of a graph an operator would only take the host's time.
    return attend(session, query, key, value, kernel, lengths, mask=mask, indices=indices)


def _keys_that_count(
    session: Session,
    rows: KeyRows | None,
    key: Tensor,
    value: Tensor,
    kwargs: dict[str, Any],
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Without the rows that a correction (``rows``) or ``valid_kv_len`` takes out.

    What the lengths of all ranks follow from is added to ``lengths``.
    """
    if rows is not None and rows.num_rows == key.shape[2]:
        lengths += rows.total
        return rows.select(key), rows.select(value)
    valid = kwargs.get("valid_kv_len")
    # With both, xDiT leaves the choice to the backend, and the indices say more.
    if valid is None or kwargs.get("indices_k") is not None:
        return key, value
    chunk_rows = key.shape[2]
    if not 0 < valid <= chunk_rows * session.size:
        raise ValueError(
            f"valid_kv_len must be in [1, {chunk_rows} rows * {session.size} ranks = "
            f"{chunk_rows * session.size}], got {valid}"
        )
    lengths.append(valid)
    _, stop = valid_rows(valid, session.rank, chunk_rows)
    return key[:, :, :stop], value[:, :, :stop]


def _check_kv_heads(query: Tensor, key: Tensor, kv_head_repeat: int) -> None:
    if kv_head_repeat != 1 and query.shape[1] != key.shape[1] * kv_head_repeat:
        raise ValueError(
            f"kv_head_repeat must be query heads / key heads, got {kv_head_repeat} with "
            f"{query.shape[1]} query heads and {key.shape[1]} key heads"
        )


def join(
    session: Session, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the joint rows, which every rank holds alike.

    Joint queries join the local ones, so every rank gets their output. A joint key must count
    once, so each rank brings an even share of them; shares may differ by one row.
    """
    strategy = arguments["joint_strategy"]
    if strategy not in ("front", "rear"):
        raise ValueError(f"joint_strategy must be front or rear, got {strategy!r}")
    joint_query = arguments["joint_query"]
    pair = [joint_query, query] if strategy == "front" else [query, joint_query]
    start, stop = share(arguments["joint_key"].shape[2], session.rank, session.size)
    joint_key = arguments["joint_key"][:, :, start:stop]
    joint_value = arguments["joint_value"][:, :, start:stop]
    return (
        torch.cat(pair, dim=2),
        torch.cat([key, joint_key], dim=2),
        torch.cat([value, joint_value], dim=2),
    )


# Under torch.compile this runs while the graph is traced, as the real function: the warning comes
# out once and breaks no graph.
@torch.compiler.assume_constant_result
def _warn_once(reason: str) -> bool:
    assert _session is not None
    if reason not in _session.warned:
        _session.warned.add(reason)
        logger.warning(
            "%s does not support %s: such calls take xDiT's own path (--sp-fallback usp)",
            _session.options.flag,
            reason,
        )
    return True
