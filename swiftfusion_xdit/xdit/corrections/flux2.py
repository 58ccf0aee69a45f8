"""FLUX.2: text rows and image rows that do not divide by the ranks.

xDiT cuts the text into unequal chunks, of which there may be fewer than ranks, and pads the image
with rows that join the keys unmasked. Both are padded here instead, and no padding is a key.
"""

from __future__ import annotations

from types import ModuleType

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import flux
from swiftfusion_xdit.xdit.patches import Patches

WRAPPER = "xFuserFlux2Transformer2DWrapper"


def check(module: ModuleType) -> list[str]:
    expected = ("self", "hidden_states", "encoder_hidden_states", "args", "timestep", "img_ids")
    wrapper = getattr(module, WRAPPER, None)
    return check_names(wrapper, "forward", (*expected, "txt_ids", "kwargs"))


def apply(module: ModuleType, patches: Patches) -> None:
    corrections.around(getattr(module, WRAPPER), "forward", patches, flux.forward)
