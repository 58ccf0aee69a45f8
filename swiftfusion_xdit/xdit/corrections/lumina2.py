"""Lumina 2: what xDiT's wrapper refuses, and torus does not need.

Its constructor refuses rings, whose steps its masks would have to follow, and heads that do not
divide by the Ulysses degree. Without a fallback to xDiT's own path neither matters.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

WRAPPER = "xFuserLumina2Transformer2DWrapper"
DEGREES = ("get_ring_parallel_world_size", "get_ulysses_parallel_world_size")


def check(module: ModuleType) -> list[str]:
    return [
        *check_names(getattr(module, WRAPPER, None), "__init__", ("self", "transformer")),
        *(problem for name in DEGREES for problem in check_names(module, name, ())),
    ]


def apply(module: ModuleType, patches: Patches) -> None:
    def init(session: Session, original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        if session.options.fallback != "error":
            original(self, *args, **kwargs)
            return
        shown = Patches()
        for name in DEGREES:
            shown.set(module, name, lambda: 1)
        try:
            original(self, *args, **kwargs)
        finally:
            shown.undo()

    corrections.around(getattr(module, WRAPPER), "__init__", patches, init)
