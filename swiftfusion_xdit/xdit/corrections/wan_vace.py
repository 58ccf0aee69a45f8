"""Wan VACE: video rows that do not divide by the ranks.

As in Wan, xDiT's zero rows are unmasked keys of self-attention, in the control blocks as well.
"""

from __future__ import annotations

from types import ModuleType

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import wan
from swiftfusion_xdit.xdit.patches import Patches

WRAPPER = "xFuserWanVACETransformer3DWrapper"


def check(module: ModuleType) -> list[str]:
    expected = ("x", "sp_world_rank", "sp_world_size", "pad_amount", "dim")
    problems = check_names(module, "chunk_and_pad_sequence", expected)
    return problems if hasattr(module, WRAPPER) else [*problems, f"{WRAPPER} is missing"]


def apply(module: ModuleType, patches: Patches) -> None:
    corrections.around(getattr(module, WRAPPER), "forward", patches, wan.forward)
