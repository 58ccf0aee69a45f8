"""Tiny Flux 2."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "FLUX.2"
FEATURES = ("even", "uneven image", "uneven text")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_flux2 import (
        xFuserFlux2Transformer2DWrapper,
    )

    side = 7 if feature == "uneven image" else 8
    # Of 9 rows chunks of 3 would leave nothing to the last of 4 ranks.
    text = 9 if feature == "uneven text" else 16
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": NUM_HEADS,
        "joint_attention_dim": 32,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    image_ids = torch.zeros(1, side, side, 4)
    image_ids[..., 1] += torch.arange(side)[:, None]
    image_ids[..., 2] += torch.arange(side)
    text_ids = torch.zeros(1, text, 4)
    text_ids[..., 3] = torch.arange(text)
    inputs = {
        "hidden_states": noise(1, side * side, 16),
        "encoder_hidden_states": noise(1, text, 32, seed=2),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids.reshape(1, -1, 4),
        "txt_ids": text_ids,
        "guidance": torch.tensor([4.0]),
    }
    return xFuserFlux2Transformer2DWrapper, config, inputs
