"""Tiny Cosmos3: a text that is understood, a video and sound that are generated."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import (
    HEAD_DIM,
    NUM_HEADS,
    Holder,
    largest_difference,
    noise,
    randomize,
    start,
)

TITLE = "Cosmos3"
FEATURES = ("even", "uneven image", "uneven text")


def run(feature: str, **arguments: Any) -> float:
    """xDiT's wrapper replaces the processors in from_pretrained alone."""
    from diffusers import Cosmos3OmniTransformer
    from xfuser.model_executor.models.transformers.transformer_cosmos3 import (
        get_cosmos3_transformer_wrapper_class,
    )

    config, inputs = build(feature)
    plain = randomize(Cosmos3OmniTransformer(**config), 0)
    expected = plain(**inputs, return_dict=False)
    start(Holder(plain), **arguments)
    wrapper = get_cosmos3_transformer_wrapper_class()(**config).eval()
    wrapper._install_xfuser_processors()
    wrapper.load_state_dict(plain.state_dict())
    outs = wrapper(**inputs)
    return largest_difference(outs[0] + outs[1], expected[0] + expected[1])


def build(feature: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {
        "head_dim": HEAD_DIM,
        "hidden_size": 32,
        "intermediate_size": 48,
        "latent_channel": 4,
        "latent_patch_size": 2,
        "num_attention_heads": NUM_HEADS,
        # With fewer heads of keys xDiT's causal attention fails under SDPA.
        "num_key_value_heads": NUM_HEADS,
        "num_hidden_layers": 2,
        "patch_latent_dim": 16,
        "rope_axes_dim": (4, 2, 2),
        "sound_gen": True,
        "sound_dim": 5,
        "timestep_scale": 1.0,
        "vocab_size": 64,
    }
    frames, side, sound = 3, 4, 4
    if feature == "uneven image":
        sound = 3
    text = 5 if feature == "uneven text" else 4
    vision = frames * side * side
    length = text + vision + sound
    generator = torch.Generator().manual_seed(5)
    seen = torch.arange(text, text + vision)
    heard = torch.arange(text + vision, length)
    inputs = {
        "input_ids": torch.randint(64, (text,), generator=generator),
        "text_indexes": torch.arange(text),
        "position_ids": torch.randint(20, (3, length), generator=generator),
        "und_len": text,
        "sequence_length": length,
        "vision_tokens": [noise(1, 4, frames, 2 * side, 2 * side)],
        "vision_token_shapes": [(frames, side, side)],
        "vision_sequence_indexes": seen,
        # The first frame is given.
        "vision_mse_loss_indexes": seen[side * side :],
        "vision_timesteps": torch.full((vision - side * side,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(1, frames)],
        "sound_tokens": [noise(5, sound, seed=2)],
        "sound_token_shapes": [(sound, 1, 1)],
        "sound_sequence_indexes": heard,
        "sound_mse_loss_indexes": heard,
        "sound_timesteps": torch.full((sound,), 500.0),
        "sound_noisy_frame_indexes": [torch.arange(sound)],
    }
    return config, inputs
