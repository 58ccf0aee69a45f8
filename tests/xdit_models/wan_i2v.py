"""Tiny Wan 2.1 that also attends to an image."""

from __future__ import annotations

from typing import Any

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer
from tests.xdit_models import wan

TITLE = "Wan 2.1 I2V"
FEATURES = ("even", "uneven image")


def run(feature: str, **arguments: Any) -> float:
    wrapper, config, inputs = wan.build(feature)
    config |= {"image_dim": 32, "added_kv_proj_dim": NUM_HEADS * HEAD_DIM}
    inputs |= {
        # What comes before the last 512 rows is the image's, in diffusers and in xDiT.
        "encoder_hidden_states": noise(1, 512, 32, seed=2),
        "encoder_hidden_states_image": noise(1, 9, 32, seed=3),
    }
    return run_transformer(wrapper, config, inputs, **arguments)
