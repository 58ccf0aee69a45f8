"""FLUX.1-dev, 12B."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.step_models import Latents, Make, as_built

TITLE = "FLUX.1-dev"
CONFIG = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TINY = CONFIG | {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
SIZES = {"1024": Latents(1, 128, 128, 512)}
TINY_SIZES = {"128": Latents(1, 16, 16, 32), "256": Latents(1, 32, 32, 32)}
RUNNER = ("xfuser.model_executor.models.runner_models.flux", "xFuserFluxModel")
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
wrap = as_built


def parse(size: str, text: int) -> Latents:
    """Pixels of a square image's side."""
    if not size.isdigit() or int(size) % 16:
        raise ValueError(f"--sizes of {TITLE} are pixels, multiples of 16, got {size}")
    return Latents(1, int(size) // 8, int(size) // 8, text)


def build(config: dict[str, Any]) -> nn.Module:
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper,
    )

    return xFuserFlux1Transformer2DWrapper(**config)


def prepare(state: Any, latents: Latents) -> None:
    state.max_condition_sequence_length = latents.text
    state.split_text_embed_in_sp = True


def inputs(config: dict[str, Any], latents: Latents, make: Make) -> dict[str, Any]:
    """Of a whole step, as FluxPipeline passes them; xDiT's wrapper takes this rank's rows."""
    rows, columns = latents.height // 2, latents.width // 2
    where = {"device": make.device, "dtype": make.dtype}
    ids = torch.zeros(rows, columns, 3, **where)
    ids[..., 1] += torch.arange(rows, device=make.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=make.device)[None, :]
    return {
        "hidden_states": make.noise(1, latents.image_tokens, config["in_channels"]),
        "encoder_hidden_states": make.noise(1, latents.text, config["joint_attention_dim"]),
        "pooled_projections": make.noise(1, config["pooled_projection_dim"]),
        # The model multiplies both by 1000: exact in bf16, or compiled code would see other values.
        "timestep": torch.full((1,), 0.5, **where),
        "guidance": torch.full((1,), 4.0, device=make.device),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(latents.text, 3, **where),
        "return_dict": False,
    }
