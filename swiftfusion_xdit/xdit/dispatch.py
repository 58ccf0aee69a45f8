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
from swiftfusion_xdit.xdit.key_rows import share
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session, attention_op

logger = logging.getLogger(__name__)

# Entries of attention_kwargs that only block-sparse backends read: a dense backend, xDiT's or
# ours, computes the same without them.
SPARSE_ONLY_PREFIXES = ("spargeattn_", "use_spargeattn_", "vsa_", "use_vsa_", "ssta_")
SPARSE_ONLY_NAMES = frozenset(
    {
        "attn_mask_share_within_head",
        "attn_pad_type",
        "attn_sparse_type",
        "attn_use_text_mask",
        "encoder_sequence_length",
        "sp_size",
        "sparse_text_to_image",
        "text_mask",
        "thw",
        "tile_size",
        "win_size",
    }
)

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
        ValueError: joint_strategy or kv_head_repeat do not fit the tensors.
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
    key_rows = session.key_rows
    if key_rows is not None and key_rows.num_rows == key.shape[2]:
        key, value = key_rows.select(key), key_rows.select(value)
    if arguments["joint_strategy"]:
        query, key, value = join(session, query, key, value, arguments)
    return attention_op(query, key, value, kernel)


def unsupported(session: Session, query: Tensor, arguments: dict[str, Any]) -> str | None:
    """Which argument of a USP call cannot be honoured, or None."""
    if arguments["dropout_p"]:
        return f"dropout_p={arguments['dropout_p']}"
    if arguments["is_causal"]:
        return "is_causal=True"
    for name, content in (arguments["attention_kwargs"] or {}).items():
        if content is not None and not _is_sparse_only(name):
            return f"attention_kwargs[{name!r}]"
    if session.kernel_for(arguments["backend"], query.device.type) is None:
        named = arguments["backend"] or session.state.attention_backend
        return f"attention backend {named.name} on {query.device.type}"
    # With one patch the cache that xDiT keeps for PipeFusion is what went in just now.
    attn_layer, num_patches = arguments["attn_layer"], session.state.num_pipeline_patch
    if (
        num_patches > 1
        and attn_layer is not None
        and session.cache_manager().has_cache_entry(attn_layer)
    ):
        return f"attn_layer with a KV cache (PipeFusion, num_pipeline_patch={num_patches})"
    if session.state.fp8_comms is not None:
        return "fp8 communication (--use_fp8_comms)"
    return None


def _is_sparse_only(name: str) -> bool:
    return name in SPARSE_ONLY_NAMES or name.startswith(SPARSE_ONLY_PREFIXES)


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
