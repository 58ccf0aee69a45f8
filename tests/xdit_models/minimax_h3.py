"""Tiny MiniMax-H3: text, sound and video in one packed sequence, which xDiT pads to 64 rows."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, Holder, largest_difference, noise, randomize, start

TITLE = "MiniMax-H3"
FEATURES = ("even", "uneven image")
TEXT, SOUND = 9, 7


def run(feature: str, **arguments: Any) -> float:
    """xDiT splits its rows by the Ulysses degree alone, and allows no ring."""
    from diffusers import MiniMaxH3Transformer3DModel
    from xfuser.model_executor.models.transformers.transformer_minimax_h3 import (
        xFuserMiniMaxH3Transformer3DWrapper,
    )

    config, inputs = build(feature)
    plain = randomize(MiniMaxH3Transformer3DModel(**config), 0)
    expected = plain(**inputs, return_dict=False)
    ranks = torch.distributed.get_world_size()
    start(Holder(plain), **{**arguments, "ulysses_degree": ranks, "ring_degree": 1})
    wrapper = xFuserMiniMaxH3Transformer3DWrapper(**config).eval()
    wrapper.load_state_dict(plain.state_dict())
    return largest_difference(wrapper(**inputs, return_dict=False), expected)


def build(feature: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {
        # Of xDiT's own Ulysses a multiple of the ranks.
        "num_attention_heads": 8,
        "attention_head_dim": HEAD_DIM,
        "hidden_size": 32,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 48,
        "in_channels": 4,
        "audio_in_channels": 5,
        "text_dim": 24,
        "freq_dim": 32,
        "time_embed_hidden_dim": 32,
        "time_embed_dim": 32,
        "rope_freq_dim": 2,
    }
    # 48 rows of video make 64 with text and sound; of 27 the last 21 of 64 are padding.
    frames, side = 3, 3 if feature == "uneven image" else 4
    video = frames * side * side
    length = TEXT + SOUND + video
    tags = torch.tensor([1] * TEXT + [2] * SOUND + [0] * video)
    rows = torch.arange(length)
    inputs = {
        "hidden_states": noise(1, video, 16),
        "audio_hidden_states": noise(1, SOUND, 5, seed=2),
        "encoder_hidden_states": noise(1, TEXT, 24, seed=3),
        "timestep": torch.tensor([0.0, 0.5]),
        "timestep_indices": (tags != 1).long(),
        "token_tags": tags,
        "position_ids": torch.stack([rows, rows % side, rows // side], dim=1),
        "video_indices": rows[TEXT + SOUND :],
        "audio_indices": rows[TEXT : TEXT + SOUND],
        "text_indices": rows[:TEXT],
    }
    return config, inputs
