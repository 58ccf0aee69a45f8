"""Which arguments of a USP call torus honours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from swiftfusion_xdit.xdit.attend import EXTRA_INPUTS
from swiftfusion_xdit.xdit.key_masks import is_key_mask
from swiftfusion_xdit.xdit.session import OPAQUE, Session

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
# Entries that say which keys count.
MASKS = frozenset({"attn_mask", "cu_seqlens_k", "indices_k", "max_seqlen_k", "valid_kv_len"})


def unsupported(session: Session, query: Tensor, arguments: dict[str, Any]) -> str | None:
    """Which argument of a USP call cannot be honoured, or None."""
    if arguments["dropout_p"]:
        return f"dropout_p={arguments['dropout_p']}"
    if arguments["is_causal"]:
        return "is_causal=True"
    kernel = session.kernel_for(arguments["backend"], query.device.type)
    if kernel is None:
        named = arguments["backend"] or session.state.attention_backend
        return f"attention backend {named.name} on {query.device.type}"
    if session.options.wire != "exact" and query.device.type != "cpu":
        return f"fp8 on the wire (--sp-wire, --use_fp8_comms) on {query.device.type}"
    kwargs = arguments["attention_kwargs"] or {}
    if kernel.startswith(OPAQUE):
        return _unsupported_by_opaque(session, query, kernel, kwargs, arguments["joint_strategy"])
    for name, content in kwargs.items():
        if content is not None and not _is_dense(name):
            return f"attention_kwargs[{name!r}]"
    return _unsupported_mask(session, query, kwargs, arguments["joint_strategy"])


def _is_dense(name: str) -> bool:
    return name in MASKS or name in SPARSE_ONLY_NAMES or name.startswith(SPARSE_ONLY_PREFIXES)


def _unsupported_by_opaque(
    session: Session, query: Tensor, kernel: str, kwargs: dict[str, Any], joint_strategy: str | None
) -> str | None:
    if is_sparse(kernel) and joint_strategy:
        return f"joint_strategy={joint_strategy!r} with the sparse backend {kernel[len(OPAQUE) :]}"
    for name in kwargs.get(EXTRA_INPUTS) or ():
        extra = kwargs.get(name)
        if extra is not None and (extra.shape != query.shape or joint_strategy):
            return (
                f"attention_kwargs[{EXTRA_INPUTS!r}] {name!r} of shape {tuple(extra.shape)} with "
                f"queries {tuple(query.shape)} and joint_strategy={joint_strategy!r}"
            )
    return _not_whole(session, query, f"attention backend {kernel[len(OPAQUE) :]}")


def _unsupported_mask(
    session: Session, query: Tensor, kwargs: dict[str, Any], joint_strategy: str | None
) -> str | None:
    # A mask does not say where the joint rows lie in it. A valid length is of the other rows.
    for name in ("attn_mask", "indices_k"):
        if joint_strategy and kwargs.get(name) is not None:
            return f"attention_kwargs[{name!r}] with joint_strategy={joint_strategy!r}"
    mask = kwargs.get("attn_mask")
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1:
        return (
            f"attention_kwargs['attn_mask'] of shape {tuple(mask.shape)}: it must be [b, 1, s, s]"
        )
    if is_key_mask(mask) and mask.shape[3] > 1:
        # Masked rows stay at home, and any mesh and schedule serves.
        return _too_few_heads(session, query, "attention_kwargs['attn_mask']")
    return _not_whole(session, query, "attention_kwargs['attn_mask']")


def _not_whole(session: Session, query: Tensor, what: str) -> str | None:
    """Why no rank can attend the whole sequence, or None."""
    conflict = session.options.split_sequence
    if conflict is not None:
        return f"{what}, {conflict}"
    return _too_few_heads(session, query, what)


def _too_few_heads(session: Session, query: Tensor, what: str) -> str | None:
    if query.shape[1] >= session.size:
        return None
    return (
        f"{what} with {query.shape[1]} heads on {session.size} ranks: each rank attends the whole "
        "sequence, so each needs a head"
    )


def is_sparse(kernel: str) -> bool:
    """Whether a kernel skips blocks by where they lie, so that rows must stay in their places."""
    return kernel == f"{OPAQUE}FLEX_BLOCK_ATTN" or any(
        word in kernel for word in ("SPARGE", "SPARSE", "VSA")
    )
