"""Tiny Flux."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "FLUX.1"
FEATURES = ("even", "uneven image", "uneven text")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper,
    )

    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": NUM_HEADS,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    side = 7 if feature == "uneven image" else 8
    text = 15 if feature == "uneven text" else 16
    image_ids = torch.zeros(side, side, 3)
    image_ids[..., 1] += torch.arange(side)[:, None]
    image_ids[..., 2] += torch.arange(side)[None, :]
    inputs = {
        "hidden_states": noise(1, side * side, 16),
        "encoder_hidden_states": noise(1, text, 32, seed=2),
        "pooled_projections": noise(1, 32, seed=3),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }
    return xFuserFlux1Transformer2DWrapper, config, inputs
