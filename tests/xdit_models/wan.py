"""Tiny Wan."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "Wan 2.1"
FEATURES = ("even", "uneven image")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_wan import (
        xFuserWanTransformer3DWrapper,
    )

    side = 6 if feature == "uneven image" else 8
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    inputs = {
        # 3 frames of 4 x 4 patches, or of 3 x 3: 48 rows, or 27.
        "hidden_states": noise(1, 4, 3, side, side),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 16, 32, seed=2),
    }
    return xFuserWanTransformer3DWrapper, config, inputs
