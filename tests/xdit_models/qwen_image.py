"""Tiny QwenImage."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "QwenImage"
FEATURES = ("even", "uneven image", "uneven text", "masked text")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_qwen import (
        xFuserQwenImageTransformerWrapper,
    )

    side = 7 if feature == "uneven image" else 8
    text = 15 if feature == "uneven text" else 16
    masked = feature == "masked text"
    batch = 2 if masked else 1
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[1:, 10:] = 0
    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": NUM_HEADS,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    inputs = {
        "hidden_states": noise(batch, side * side, 16),
        "encoder_hidden_states": noise(batch, text, 32, seed=2),
        "encoder_hidden_states_mask": mask if masked else None,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, side, side)]] * batch,
    }
    return xFuserQwenImageTransformerWrapper, config, inputs
