"""Tiny HunyuanVideo."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "HunyuanVideo"
FEATURES = ("uneven text",)


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_hunyuan_video import (
        xFuserHunyuanVideoTransformer3DWrapper,
    )

    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 32,
        "rope_axes_dim": (4, 6, 6),
        "guidance_embeds": True,
    }
    inputs = {
        "hidden_states": noise(1, 4, 3, 8, 8),
        "timestep": torch.tensor([500]),
        # 15 does not divide: xDiT then passes the text as joint tensors.
        "encoder_hidden_states": noise(1, 15, 32, seed=2),
        "encoder_attention_mask": torch.ones(1, 15, dtype=torch.long),
        "pooled_projections": noise(1, 32, seed=3),
        "guidance": torch.tensor([6000.0]),
    }
    return xFuserHunyuanVideoTransformer3DWrapper, config, inputs
