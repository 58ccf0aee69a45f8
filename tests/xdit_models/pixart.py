"""Tiny PixArt-Sigma."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, randomize, run_pipeline

TITLE = "PixArt"
FEATURES = ("even", "masked text")


def run(feature: str, **arguments: Any) -> float | None:
    return run_pipeline("xFuserPixArtSigmaPipeline", lambda: build(feature), **arguments)


def build(feature: str) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    transformer = PixArtTransformer2DModel(
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=NUM_HEADS * HEAD_DIM,
        caption_channels=32,
        sample_size=16,
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        transformer=randomize(transformer, 0),
        scheduler=DDIMScheduler(),
    )
    mask = torch.ones(1, 15)
    if feature == "masked text":
        mask[:, 9:] = 0
    call = {
        "height": 16 * pipeline.vae_scale_factor,
        "width": 16 * pipeline.vae_scale_factor,
        "prompt_embeds": noise(1, 15, 32, seed=2),
        "negative_prompt_embeds": noise(1, 15, 32, seed=3),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "negative_prompt": None,
        "latents": noise(1, 4, 16, 16),
        "use_resolution_binning": False,
    }
    return pipeline, call
