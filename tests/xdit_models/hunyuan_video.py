"""Tiny HunyuanVideo."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "HunyuanVideo"
FEATURES = ("even", "uneven image", "uneven text")


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
    side = 6 if feature == "uneven image" else 8
    # Text that does not divide xDiT passes as joint tensors. The last row is padding.
    text = 15 if feature == "uneven text" else 16
    mask = torch.ones(1, text + 1, dtype=torch.long)
    mask[:, -1] = 0
    inputs = {
        # 3 frames of 4 x 4 patches, or of 3 x 3: 48 rows, or 27.
        "hidden_states": noise(1, 4, 3, side, side),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, text + 1, 32, seed=2),
        "encoder_attention_mask": mask,
        "pooled_projections": noise(1, 32, seed=3),
        "guidance": torch.tensor([6000.0]),
    }
    return xFuserHunyuanVideoTransformer3DWrapper, config, inputs
