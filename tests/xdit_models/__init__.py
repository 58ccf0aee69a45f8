"""Tiny random models, one module each, run by diffusers in one process and by xDiT on ranks.

A model's module has

    TITLE      its name in docs/compatibility.md
    FEATURES   the variants that it has, of those below
    run        run(feature, **xdit_arguments): how far xDiT is from diffusers, or None on a rank to
               which xDiT gives no result
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from tests.xdit_cases import xdit_groups

# With 4 ranks: what "even" means is that rows divide by the ranks and text is split, or passed as
# joint tensors, without padding.
FEATURES = ("even", "uneven image", "uneven text", "masked text")
NAMES = (
    "flux",
    "flux2",
    "qwen_image",
    "z_image",
    "lumina2",
    "krea2",
    "ideogram4",
    "wan",
    "wan_i2v",
    "wan_ti2v",
    "wan_vace",
    "hunyuan_video",
    "hunyuan_video15",
    "ltx2",
    "cosmos3",
    "minimax_h3",
    "cogvideox",
    "consisid",
    "latte",
    "sd3",
    "sd35",
    "pixart",
    "hunyuan_dit",
    "sana",
)


def load(name: str) -> Any:
    assert name in NAMES, name
    return importlib.import_module(f"{__name__}.{name}")


def run(name: str, feature: str, **arguments: Any) -> float | None:
    """Runs on every rank of a job; leaves no group of xDiT behind."""
    with xdit_groups(), torch.no_grad():
        return load(name).run(feature, **arguments)
