"""HunyuanVideo, 13B."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.step_models import Latents, Make, as_built

TITLE = "HunyuanVideo"
CONFIG = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "rope_axes_dim": (16, 56, 56),
}
TINY = CONFIG | {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 8,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}
SIZES = {"720p": Latents(33, 90, 160, 256), "540p": Latents(33, 68, 120, 256)}  # 129 frames
TINY_SIZES = {"tiny": Latents(3, 8, 8, 16)}
RUNNER = ("xfuser.model_executor.models.runner_models.hunyuan", "xFuserHunyuanvideoModel")
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
wrap = as_built


def build(config: dict[str, Any]) -> nn.Module:
    from xfuser.model_executor.models.transformers.transformer_hunyuan_video import (
        xFuserHunyuanVideoTransformer3DWrapper,
    )

    return xFuserHunyuanVideoTransformer3DWrapper.from_config(config)


def prepare(state: Any, latents: Latents) -> None:
    state.max_condition_sequence_length = latents.text


def inputs(config: dict[str, Any], latents: Latents, make: Make) -> dict[str, Any]:
    """Of a whole step; xDiT's wrapper takes this rank's rows."""
    return {
        "hidden_states": make.noise(1, config["in_channels"], *latents.size),
        "timestep": torch.full((1,), 512, device=make.device),
        "encoder_hidden_states": make.noise(1, latents.text, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(1, latents.text, device=make.device),
        "pooled_projections": make.noise(1, config["pooled_projection_dim"]),
        "guidance": torch.full((1,), 6000.0, device=make.device, dtype=make.dtype),
        "return_dict": False,
    }
