"""Tiny Lumina 2."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import noise, run_around

TITLE = "Lumina 2"
FEATURES = ("even", "uneven image", "uneven text", "masked text")


def run(feature: str, **arguments: Any) -> float:
    return run_around(*build(feature), **arguments)


def build(feature: str) -> tuple[type, type, dict[str, Any], dict[str, Any]]:
    from diffusers import Lumina2Transformer2DModel
    from xfuser.model_executor.models.transformers.transformer_lumina2 import (
        xFuserLumina2Transformer2DWrapper,
    )

    side = 14 if feature == "uneven image" else 16
    text = 15 if feature == "uneven text" else 16
    num_heads, num_kv_heads, head_dim = 6, 3, 12
    config = {
        "sample_size": side,
        "in_channels": 4,
        "hidden_size": num_heads * head_dim,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "multiple_of": 16,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (64, 32, 32),
        "cap_feat_dim": 32,
    }
    mask = torch.ones(2, text, dtype=torch.bool)
    if feature == "masked text":
        mask[1, 10:] = False
    inputs = {
        "hidden_states": noise(2, 4, side, side),
        "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": noise(2, text, 32, seed=2),
        "encoder_attention_mask": mask,
    }
    return xFuserLumina2Transformer2DWrapper, Lumina2Transformer2DModel, config, inputs
