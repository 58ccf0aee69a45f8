"""Attention processors that several models share.

Stable Diffusion 3.5's dual blocks attend image rows alone; where there is no text, xDiT's processor
leaves a variable unbound, and fails.

Latte's temporal blocks attend across frames; of each pixel that a rank has it has all frames. xDiT
exchanges those rows too, as if the ranks' pixels were one sequence. Here they stay on the rank.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import Tensor

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

JOINT = "xFuserJointAttnProcessor2_0"
PLAIN = "xFuserAttnProcessor2_0"


_EXPECTED = ("self", "attn", "hidden_states", "encoder_hidden_states", "attention_mask")
PARAMETERS = {
    JOINT: (*_EXPECTED, "args", "kwargs"),
    PLAIN: (*_EXPECTED, "temb", "latte_temporal_attention", "args", "kwargs"),
}


def check(module: ModuleType) -> list[str]:
    return [problem for name in PARAMETERS for problem in _check(module, name)]


def _check(module: ModuleType, name: str) -> list[str]:
    return check_names(getattr(module, name, None), "__call__", PARAMETERS[name])


def entries(module: ModuleType) -> list[tuple[Any, str]]:
    """Of the two processors the unknown one; all of the module, if one has another name."""
    owners = [getattr(module, name, None) for name in PARAMETERS if _check(module, name)]
    if not owners:
        owners = [getattr(module, name) for name in PARAMETERS]
    if any("__call__" not in vars(owner or object) for owner in owners):
        classes = [c for c in vars(module).values() if isinstance(c, type)]
        owners = [c for c in classes if c.__module__ == module.__name__ and "__call__" in vars(c)]
    return [(owner, "__call__") for owner in owners]


def apply(module: ModuleType, patches: Patches) -> None:
    usp = module.USP

    def joint(
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

    def plain(session: Session, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("latte_temporal_attention"):
            return original(self, *args, **kwargs)
        shown = Patches()
        shown.set(module, "USP", _on_this_rank)
        try:
            return original(self, *args, **kwargs)
        finally:
            shown.undo()

    corrections.around(getattr(module, JOINT), "__call__", patches, joint)
    corrections.around(getattr(module, PLAIN), "__call__", patches, plain)


def _on_this_rank(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """What USP gives where there is one rank."""
    runtime_state = sys.modules["xfuser.core.distributed.runtime_state"].get_runtime_state()
    backends = sys.modules["xfuser.core.distributed.attention_backend"]
    function = backends.ATTENTION_FUNCTION_REGISTRY[runtime_state.attention_backend]
    return function(query, key, value, **arguments)[0]


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
