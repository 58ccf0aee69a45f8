"""Krea 2: padding without a mask of the text, and a mask remembered for too long.

Where there is a mask, xDiT adds its padding to it. Where there is none, rows that it appends to
divide by the ranks join the keys; here they are no keys. It remembers the last mask by where its
tensor lies and by its shape, so that another prompt's or another image size's can be taken for it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import forwards
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

WRAPPER = "xFuserKrea2Transformer2DWrapper"
PARAMETERS = (
    "self",
    "hidden_states",
    "encoder_hidden_states",
    "timestep",
    "position_ids",
    "encoder_attention_mask",
    "attention_kwargs",
    "return_dict",
)
# Of the wrapper: the mask that _attn_mask_cache is of, and with how many rows it was joined.
REMEMBERED = "swiftfusion_mask"


def check(module: ModuleType) -> list[str]:
    return check_names(getattr(module, WRAPPER, None), "forward", PARAMETERS)


def apply(module: ModuleType, patches: Patches) -> None:
    corrections.around(getattr(module, WRAPPER), "forward", patches, _forward)


def _forward(session: Session, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = forwards.bind(original, self, *args, **kwargs)
    num_rows = arguments["encoder_hidden_states"].shape[1] + arguments["hidden_states"].shape[1]
    mask = arguments["encoder_attention_mask"]
    if mask is None:
        with session.padded(num_rows):
            return original(self, **arguments)
    if not _is_remembered(self, mask, num_rows):
        self._attn_mask_cache = None
        setattr(self, REMEMBERED, (mask, mask._version, num_rows))
    return original(self, **arguments)


def _is_remembered(self: Any, mask: Tensor, num_rows: int) -> bool:
    tensor, version, rows = getattr(self, REMEMBERED, (None, 0, 0))
    return tensor is mask and version == mask._version and rows == num_rows
