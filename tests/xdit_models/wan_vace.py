"""Tiny Wan VACE."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import noise, run_transformer
from tests.xdit_models import wan

TITLE = "Wan VACE"
FEATURES = ("even", "uneven image")


def run(feature: str, **arguments: Any) -> float:
    from xfuser.model_executor.models.transformers.transformer_wan_vace import (
        xFuserWanVACETransformer3DWrapper,
    )

    _, config, inputs = wan.build(feature)
    config |= {"vace_layers": [0, 1], "vace_in_channels": 12}
    _, _, *sizes = inputs["hidden_states"].shape
    inputs |= {
        "control_hidden_states": noise(1, 12, *sizes, seed=4),
        "control_hidden_states_scale": torch.tensor([0.7, 1.3]),
    }
    return run_transformer(xFuserWanVACETransformer3DWrapper, config, inputs, **arguments)
