"""Faults of xDiT's model wrappers outside attention, corrected while ``torus`` runs.

One module per wrapper says what is wrong there and mends it. Without a session, so under any
other strategy, a corrected wrapper does what xDiT wrote.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session, current

_TRANSFORMERS = "xfuser.model_executor.models.transformers."

# The wrapper's module -> the module here that corrects it.
CORRECTED: dict[str, str] = {
    f"{_TRANSFORMERS}transformer_wan": "wan",
    "xfuser.model_executor.layers.attention_processor": "processors",
    f"{_TRANSFORMERS}transformer_flux": "flux",
    f"{_TRANSFORMERS}transformer_flux2": "flux2",
    f"{_TRANSFORMERS}transformer_ideogram4": "ideogram4",
    f"{_TRANSFORMERS}transformer_krea2": "krea2",
    f"{_TRANSFORMERS}transformer_lumina2": "lumina2",
    f"{_TRANSFORMERS}transformer_qwen": "qwen_image",
    f"{_TRANSFORMERS}transformer_z_image": "z_image",
    f"{_TRANSFORMERS}transformer_hunyuan_video": "hunyuan_video",
    f"{_TRANSFORMERS}transformer_hunyuan_video15": "hunyuan_video15",
    f"{_TRANSFORMERS}transformer_wan_vace": "wan_vace",
    f"{_TRANSFORMERS}transformer_cosmos3": "cosmos3",
    f"{_TRANSFORMERS}transformer_ltx2": "ltx2",
}


def check(module: ModuleType) -> list[str]:
    """What stands in the way of correcting ``module``; empty if nothing does."""
    return _correction(module).check(module)


def apply(module: ModuleType, patches: Patches) -> None:
    """Correct ``module``, which has just executed."""
    _correction(module).apply(module, patches)


def _correction(module: ModuleType) -> Any:
    return importlib.import_module(f"{__name__}.{CORRECTED[module.__name__]}")


def around(owner: type, name: str, patches: Patches, wrapper: Callable[..., Any]) -> None:
    """Call ``wrapper(session, original, self, ...)`` in place of a method while torus runs."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        session: Session | None = current()
        if session is None:
            return original(self, *args, **kwargs)
        return wrapper(session, original, self, *args, **kwargs)

    patches.set(owner, name, method)
