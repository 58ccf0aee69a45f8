"""CogVideoX-5B: both passes of a guided step at once, as its pipeline runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.step_models import Latents, Make

TITLE = "CogVideoX-5B"
CONFIG = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
TINY = CONFIG | {
    "num_attention_heads": 8,
    "attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "max_text_seq_length": 16,
}
# 49 frames of 480 x 720; 161 frames, 20 seconds, of 768 x 1360.
SIZES = {"49f": Latents(13, 60, 90, 226), "161f": Latents(41, 96, 170, 226)}
TINY_SIZES = {"tiny": Latents(2, 8, 8, 16)}
RUNNER = None  # xDiT has a pipeline for it
BLOCKS = ("transformer_blocks",)
GUIDED = 2


def build(config: dict[str, Any]) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(**config)


def wrap(model: nn.Module) -> nn.Module:
    from xfuser.model_executor.models.transformers.cogvideox_transformer_3d import (
        xFuserCogVideoXTransformer3DWrapper,
    )

    return xFuserCogVideoXTransformer3DWrapper(model)


def prepare(state: Any, latents: Latents) -> None:
    state.max_condition_sequence_length = latents.text
    state.split_text_embed_in_sp = True
    state.vae_scale_factor_spatial = 8
    state.ready = True  # xDiT's pipeline cuts the inputs, and so does `inputs`


def inputs(config: dict[str, Any], latents: Latents, make: Make) -> dict[str, Any]:
    """This rank's rows of the image and of the text, cut as xDiT's pipeline does."""
    channels, text_dim = config.get("in_channels", 16), config.get("text_embed_dim", 4096)
    frames, height, width = latents.size
    rows, dim = (frames, height // 2, width // 2), config["attention_head_dim"]
    angles = make.noise(*rows, dim // 2).float().repeat_interleave(2, dim=-1)
    angles = make.mine(angles, 1).reshape(-1, dim)
    image = make.noise(GUIDED, frames, channels, height, width)
    text = make.noise(GUIDED, latents.text, text_dim)
    return {
        "hidden_states": make.mine(image, 3),
        "encoder_hidden_states": make.mine(text, 1),
        "timestep": torch.full((GUIDED,), 512, device=make.device),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "return_dict": False,
    }
