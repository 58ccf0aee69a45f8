"""Wan: image rows that do not divide by the ranks.

xDiT appends zero rows, which join the keys of self-attention unmasked. Here they stay queries,
whose output xDiT cuts off again, and are no keys.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

WRAPPER = "xFuserWanTransformer3DWrapper"


def check(module: ModuleType) -> list[str]:
    expected = ("self", "x", "sp_world_rank", "sp_world_size", "pad_amount", "dim")
    return check_names(getattr(module, WRAPPER, None), "_chunk_and_pad_sequence", expected)


def apply(module: ModuleType, patches: Patches) -> None:
    wrapper = getattr(module, WRAPPER)
    corrections.around(wrapper, "forward", patches, forward)


def forward(
    session: Session, original: Any, self: Any, hidden_states: Any, *args: Any, **kwargs: Any
) -> Any:
    """``hidden_states [b, c, frames, height, width]``; xDiT pads and cuts its embedding."""
    sizes = zip(hidden_states.shape[2:], self.config.patch_size, strict=True)
    num_rows = 1
    for size, patch in sizes:
        num_rows *= size // patch
    with session.padded(num_rows):
        return original(self, hidden_states, *args, **kwargs)
