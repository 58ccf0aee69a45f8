"""LTX-2: video rows that do not divide by the ranks.

xDiT's zero rows at their end are unmasked keys, of the video's self-attention and of the audio's
attention to the video, for which each rank gathers all video rows. Here they are no keys of the
first, and are cut off before the second.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

WRAPPER = "xFuserLTX2VideoTransformer3DWrapper"
PROCESSORS = ("xFuserLTX2AudioVideoAttnProcessor", "xFuserLTX2PerturbedAttnProcessor")


def check(module: ModuleType) -> list[str]:
    padding = ("self", "x", "sp_world_rank", "sp_world_size", "pad_amount", "dim")
    problems = check_names(getattr(module, WRAPPER, None), "_chunk_and_pad_sequence", padding)
    for name in PROCESSORS:
        expected = ("self", "use_parallel_attention", "gather_kv")
        problems += check_names(getattr(module, name, None), "__init__", expected)
    return problems


def apply(module: ModuleType, patches: Patches) -> None:
    corrections.around(getattr(module, WRAPPER), "forward", patches, _forward)
    for name in PROCESSORS:
        corrections.around(getattr(module, name), "__call__", patches, _attend)


def _forward(
    session: Session, original: Any, self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    with session.padded(hidden_states.shape[1]):
        return original(self, hidden_states, *args, **kwargs)


def _attend(
    session: Session,
    original: Any,
    self: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Any = None,
    query_rotary_emb: Any = None,
    key_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    if self.gather_kv and session.key_rows is not None:
        (num_rows,) = session.key_rows.total
        # Rotary embeddings are [b, s, c] or [b, h, s, c].
        encoder_hidden_states, *key_rotary_emb = (
            session.group.all_gather(part.contiguous(), dim=-2).narrow(-2, 0, num_rows)
            for part in (encoder_hidden_states, *key_rotary_emb)
        )
        self = type(self)(use_parallel_attention=False)
    return original(
        self,
        attn,
        hidden_states,
        encoder_hidden_states,
        attention_mask,
        query_rotary_emb,
        key_rotary_emb,
        **kwargs,
    )
