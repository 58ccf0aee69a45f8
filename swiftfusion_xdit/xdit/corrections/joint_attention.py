"""Attention of Stable Diffusion 3.5's dual blocks, which is over image rows alone.

xDiT's processor leaves a variable unbound where there is no text, and fails.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

PROCESSOR = "xFuserJointAttnProcessor2_0"


def check(module: ModuleType) -> list[str]:
    expected = ("self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask")
    processor = getattr(module, PROCESSOR, None)
    return check_names(processor, "__call__", (*expected, "args", "kwargs"))


def apply(module: ModuleType, patches: Patches) -> None:
    usp = module.USP

    def call(
        session: Session,
        original: Any,
        self: Any,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states is not None or hidden_states.ndim != 3:
            return original(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        return _self_attention(usp, attn, hidden_states)

    corrections.around(getattr(module, PROCESSOR), "__call__", patches, call)


def _self_attention(usp: Any, attn: Any, hidden_states: Tensor) -> Tensor:
    """``[b, s, c]`` to ``[b, s, c]``."""
    query, key, value = (
        project(hidden_states).unflatten(-1, (attn.heads, -1))
        for project in (attn.to_q, attn.to_k, attn.to_v)
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    out = usp(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_layer=attn)
    out = out.transpose(1, 2).flatten(2).to(query.dtype)
    for layer in attn.to_out:
        out = layer(out)
    return out
