"""Tiny Ideogram 4."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "Ideogram 4"
FEATURES = ("even", "uneven image", "uneven text")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from diffusers.models.transformers.transformer_ideogram4 import (
        LLM_TOKEN_INDICATOR,
        OUTPUT_IMAGE_INDICATOR,
    )
    from xfuser.model_executor.models.transformers.transformer_ideogram4 import (
        get_ideogram4_transformer_wrapper_class,
    )

    side = 7 if feature == "uneven image" else 8
    text = 15 if feature == "uneven text" else 16
    num_rows = text + side * side
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": 64,
        "adaln_dim": 32,
        "llm_features_dim": 32,
        "mrope_section": (4, 2, 2),
    }
    is_text = torch.arange(num_rows) < text
    position_ids = torch.zeros(1, num_rows, 3, dtype=torch.long)
    position_ids[:, :text] = torch.arange(text)[:, None]
    position_ids[:, text:, 0] = text
    position_ids[:, text:, 1] = torch.arange(side).repeat_interleave(side)
    position_ids[:, text:, 2] = torch.arange(side).repeat(side)
    inputs = {
        "hidden_states": noise(1, num_rows, 16),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, num_rows, 32, seed=2),
        "position_ids": position_ids,
        "segment_ids": torch.zeros(1, num_rows, dtype=torch.long),
        "indicator": torch.where(is_text, LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR)[None],
    }
    return get_ideogram4_transformer_wrapper_class(), config, inputs
