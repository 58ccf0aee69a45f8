"""What the ``torch.backends`` entry point runs: lazy hooks on xfuser's modules.

It runs at the end of ``import torch``, in every process that imports torch, so it is standard
library only, costs one entry in ``sys.meta_path``, and never raises. xfuser's modules are handed
to :mod:`swiftfusion_xdit.xdit.hooks` right after each has executed, before anyone else sees it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# In the order in which `import xfuser` executes them.
HOOKED_MODULES = (
    "xfuser.envs",
    "xfuser.core.distributed.parallel_state",
    "xfuser.core.distributed.attention_backend",
    "xfuser.core.distributed.fp8_comms",
    "xfuser.core.sparge_attention.head_balance",
    "xfuser.config.args",
    "xfuser.core.distributed.runtime_state",
    "xfuser.model_executor.layers.usp",
    "xfuser.model_executor.layers.attention_processor",
    "xfuser.model_executor.models.transformers.transformer_wan",
    "xfuser.model_executor.models.transformers.transformer_flux",
    "xfuser.model_executor.models.transformers.transformer_flux2",
    "xfuser.model_executor.models.transformers.transformer_ideogram4",
    "xfuser.model_executor.models.transformers.transformer_krea2",
    "xfuser.model_executor.models.transformers.transformer_lumina2",
    "xfuser.model_executor.models.transformers.transformer_qwen",
    "xfuser.model_executor.models.transformers.transformer_z_image",
    "xfuser.model_executor.models.transformers.transformer_hunyuan_video",
    "xfuser.model_executor.models.transformers.transformer_hunyuan_video15",
    "xfuser.model_executor.models.transformers.transformer_wan_vace",
    "xfuser.model_executor.models.transformers.transformer_cosmos3",
    "xfuser.model_executor.models.transformers.transformer_ltx2",
)


class HookingLoader(Loader):
    """Executes a module with its own loader, then hands it over."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever inspects the module later finds the loader that it would have had.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        hand_over(module)


class XfuserFinder(MetaPathFinder):
    """Finds nothing itself: wraps the loader that the other finders give a hooked module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in HOOKED_MODULES:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if isinstance(finder, XfuserFinder) or find_spec is None:
                continue
            spec = find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = HookingLoader(spec.loader)
                return spec
        return None


def hand_over(module: ModuleType) -> None:
    """Give an executed module to the hooks; they keep their own account of what fails."""
    hooks = importlib.import_module("swiftfusion_xdit.xdit.hooks")
    hooks.after_import(module)


def is_installed() -> bool:
    return any(isinstance(finder, XfuserFinder) for finder in sys.meta_path)


def install() -> None:
    """Hook the modules of xfuser, those that are loaded already and those still to come."""
    if not is_installed():
        sys.meta_path.insert(0, XfuserFinder())
    for name in HOOKED_MODULES:
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if module is not None and not getattr(spec, "_initializing", False):
            hand_over(module)


def uninstall() -> None:
    """Take the finder away; modules that were hooked stay as they are."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, XfuserFinder)]


def autoload() -> None:
    """The entry point. Does nothing where ``SWIFTFUSION_DISABLE`` is set; never raises."""
    try:
        if os.environ.get("SWIFTFUSION_DISABLE", "0").lower() in ("1", "true", "yes", "on"):
            return
        install()
    except Exception as error:
        print(f"swiftfusion_xdit: not loaded: {error!r}", file=sys.stderr)
