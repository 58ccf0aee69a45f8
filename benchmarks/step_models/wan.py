"""Wan2.1-T2V-14B, 81 frames; one pass of a step, which takes two with guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.step_models import Latents, Make, as_built

TITLE = "Wan2.1-T2V-14B"
CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
TINY = CONFIG | {
    "num_attention_heads": 8,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SIZES = {"480p": Latents(21, 60, 104, 512), "720p": Latents(21, 90, 160, 512)}
TINY_SIZES = {"tiny": Latents(3, 8, 8, 16)}
RUNNER = ("xfuser.model_executor.models.runner_models.wan", "xFuserWan21T2VModel")
BLOCKS = ("blocks",)
wrap = as_built


def build(config: dict[str, Any]) -> nn.Module:
    from xfuser.model_executor.models.transformers.transformer_wan import (
        xFuserWanTransformer3DWrapper,
    )

    return xFuserWanTransformer3DWrapper(**config)


def prepare(state: Any, latents: Latents) -> None:
    pass


def inputs(config: dict[str, Any], latents: Latents, make: Make) -> dict[str, Any]:
    """Of a whole step; xDiT's wrapper takes this rank's rows."""
    return {
        "hidden_states": make.noise(1, config["in_channels"], *latents.size),
        "timestep": torch.full((1,), 512.0, device=make.device),
        "encoder_hidden_states": make.noise(1, latents.text, config["text_dim"]),
        "return_dict": False,
    }
