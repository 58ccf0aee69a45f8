"""Tiny LTX-2: video and audio."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "LTX-2"
FEATURES = ("even", "uneven image")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_ltx2 import (
        xFuserLTX2VideoTransformer3DWrapper,
    )

    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": HEAD_DIM,
        "cross_attention_dim": NUM_HEADS * HEAD_DIM,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": NUM_HEADS,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": NUM_HEADS * 8,
        "num_layers": 2,
        "caption_channels": 32,
        "rope_type": "split",
    }
    frames, side = 3, 3 if feature == "uneven image" else 4
    mask = torch.ones(1, 12)
    mask[:, :3] = 0
    inputs = {
        "hidden_states": noise(1, frames * side * side, 4),
        "audio_hidden_states": noise(1, 7, 4, seed=2),
        "encoder_hidden_states": noise(1, 12, 32, seed=3),
        "audio_encoder_hidden_states": noise(1, 12, 32, seed=4),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "timestep": torch.tensor([[500.0]]),
        "audio_timestep": torch.tensor([[500.0]]),
        "num_frames": frames,
        "height": side,
        "width": side,
        "audio_num_frames": 7,
    }
    return xFuserLTX2VideoTransformer3DWrapper, config, inputs
