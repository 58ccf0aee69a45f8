"""Tiny Wan 2.2 that has a time step for every row, as its first frames may be given."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import run_transformer
from tests.xdit_models import wan

TITLE = "Wan 2.2 TI2V"
FEATURES = ("even", "uneven image")


def run(feature: str, **arguments: Any) -> float:
    wrapper, config, inputs = wan.build(feature)
    _, _, frames, height, width = inputs["hidden_states"].shape
    timestep = torch.full((1, frames * height * width // 4), 500.0)
    timestep[:, : height * width // 4] = 0.0
    return run_transformer(wrapper, config, {**inputs, "timestep": timestep}, **arguments)
