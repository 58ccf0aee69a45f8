"""Tiny Krea 2."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "Krea 2"
FEATURES = ("even", "uneven image", "uneven text", "masked text")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_krea2 import (
        xFuserKrea2Transformer2DWrapper,
    )

    side = 7 if feature == "uneven image" else 8
    text = 16 if feature in ("even", "uneven image") else 15
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_HEADS // 2,
        "intermediate_size": 64,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 32,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 64,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    }
    position_ids = torch.zeros(text + side * side, 3)
    position_ids[text:, 1] = torch.arange(side).repeat_interleave(side)
    position_ids[text:, 2] = torch.arange(side).repeat(side)
    mask = torch.ones(2, text, dtype=torch.bool)
    mask[1, 10:] = False
    inputs = {
        "hidden_states": noise(2, side * side, 16),
        "encoder_hidden_states": noise(2, text, 2, 32, seed=2),
        "timestep": torch.tensor([0.5, 0.5]),
        "position_ids": position_ids,
        "encoder_attention_mask": mask if feature == "masked text" else None,
    }
    return xFuserKrea2Transformer2DWrapper, config, inputs
