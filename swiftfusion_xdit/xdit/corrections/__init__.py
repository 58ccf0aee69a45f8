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

import torch

from swiftfusion_xdit.xdit.compat import (
    SUPPORTED_VERSIONS,
    IncompatibleXfuserError,
    installed_version,
)
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


def apply(module: ModuleType, patches: Patches) -> list[str]:
    """Correct ``module``, which has just executed.

    If it is not the module that the correction was written for, its models are refused while torus
    runs, and no others: see :func:`_refuse`.

    Returns:
        what does not fit, if nothing in the module is known to be a model: then every model that
        runs may be one of its.
    """
    correction = _correction(module)
    try:
        problems = check(module)
        if not problems:
            correction.apply(module, patches)
            return []
    except Exception as error:  # an unknown xfuser may hold anything
        problems = [f"correcting {module.__name__} failed: {error!r}"]
    entries = getattr(correction, "entries", entries_of)(module)
    for owner, name in entries:
        _refuse(owner, name, f"{module.__name__}: {'; '.join(problems)}", patches)
    return [] if entries else [f"{module.__name__}: {problem}" for problem in problems]


def entries_of(module: ModuleType) -> list[tuple[Any, str]]:
    """Functions of ``module`` that its models, and no others, must come through, as (owner, name).

    A model is a torch module with a forward of its own, by whatever name. Some wrappers make that
    class in a function on first use; what they call by then are processors, and the module's USP.
    """
    classes = [
        content
        for content in dict.fromkeys(c for c in vars(module).values() if isinstance(c, type))
        if content.__module__ == module.__name__
    ]
    models = [c for c in classes if issubclass(c, torch.nn.Module) and "forward" in vars(c)]
    if models:
        return [(model, "forward") for model in models]
    entries: list[tuple[Any, str]] = [(c, "__call__") for c in classes if "__call__" in vars(c)]
    return [*entries, (module, "USP")] if hasattr(module, "USP") else entries


def _refuse(owner: Any, name: str, problem: str, patches: Patches) -> None:
    """Let ``owner.name`` raise while torus runs, before it sends anything to another rank."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def refused(*args: Any, **kwargs: Any) -> Any:
        session = current()
        if session is None:
            return original(*args, **kwargs)
        raise IncompatibleXfuserError(
            f"{session.options.flag} cannot run this model: it must correct xDiT's wrapper, and "
            f"does not know that of xfuser {installed_version()}: {problem}. Install xfuser "
            f"{SUPPORTED_VERSIONS} in a known release, or use --sp-strategy usp"
        )

    patches.set(owner, name, refused)


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
