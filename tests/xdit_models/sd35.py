"""Tiny Stable Diffusion 3.5 medium: its first blocks also attend the image alone."""

from __future__ import annotations

from typing import Any

from tests.xdit_cases import run_pipeline
from tests.xdit_models import sd3

TITLE = "Stable Diffusion 3.5 medium"
FEATURES = ("even", "uneven text")


def run(feature: str, **arguments: Any) -> float | None:
    def build() -> tuple[Any, dict[str, Any]]:
        return sd3.build(feature, dual_attention_layers=(0,))

    return run_pipeline("xFuserStableDiffusion3Pipeline", build, **arguments)
