"""Ideogram 4: text and image rows that together do not divide by the ranks.

xDiT appends zero rows, which join the keys unmasked. Here they are no keys.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import forwards
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

# Makes the wrapper's class, when it is first asked for; MADE then holds it.
MAKE = "_make_xfuser_ideogram4_transformer_wrapper"
MADE = "_wrapper_cls"


def check(module: ModuleType) -> list[str]:
    problems = check_names(module, MAKE, ())
    if not hasattr(module, MADE):
        problems.append(f"{module.__name__}.{MADE} is missing")
    return problems


def apply(module: ModuleType, patches: Patches) -> None:
    original = getattr(module, MAKE)

    def make() -> Any:
        wrapper = original()
        corrections.around(wrapper, "forward", patches, _forward)
        return wrapper

    made = getattr(module, MADE)
    if made is not None:
        corrections.around(made, "forward", patches, _forward)
    patches.set(module, MAKE, make)


def _forward(session: Session, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = forwards.bind(original, self, *args, **kwargs)
    _, num_text, num_image = self._get_sequence_layout(arguments["indicator"])
    with session.padded(num_text + num_image):
        return original(self, **arguments)
