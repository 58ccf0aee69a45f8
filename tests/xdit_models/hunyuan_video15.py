"""Tiny HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "HunyuanVideo 1.5"
FEATURES = ("even", "uneven image", "uneven text")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_hunyuan_video15 import (
        xFuserHunyuanVideo15Transformer3DWrapper,
    )

    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "text_embed_2_dim": 16,
        "image_embed_dim": 24,
        "rope_axes_dim": (4, 6, 6),
    }
    side = 3 if feature == "uneven image" else 4
    # With 3 rows of the second text and 2 of the image: 16, or 15.
    text = 10 if feature == "uneven text" else 11
    inputs = {
        # 3 frames of 4 x 4 patches, or of 3 x 3: 48 rows, or 27.
        "hidden_states": noise(1, 4, 3, side, side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 12, 32, seed=2),
        "encoder_attention_mask": first_of(12, text),
        "encoder_hidden_states_2": noise(1, 5, 16, seed=3),
        "encoder_attention_mask_2": first_of(5, 3),
        "image_embeds": noise(1, 2, 24, seed=4),
    }
    return xFuserHunyuanVideo15Transformer3DWrapper, config, inputs


def first_of(num_rows: int, *valid: int) -> torch.Tensor:
    """A mask ``[len(valid), num_rows]`` of the first ``valid[i]`` rows of each sample."""
    return (torch.arange(num_rows)[None] < torch.tensor(valid)[:, None]).long()
