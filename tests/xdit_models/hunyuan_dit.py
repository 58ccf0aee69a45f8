"""Tiny Hunyuan-DiT."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, randomize, run_pipeline

TITLE = "Hunyuan-DiT"
FEATURES = ("even",)


def run(feature: str, **arguments: Any) -> float | None:
    return run_pipeline("xFuserHunyuanDiTPipeline", build, **arguments)


def build() -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKL, DDIMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    transformer = HunyuanDiT2DModel(
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=NUM_HEADS * HEAD_DIM,
        num_layers=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=32,
        text_len=7,
        text_len_t5=8,
    )
    # xDiT takes it for granted that eight pixels are one latent.
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )
    pipeline = HunyuanDiTPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=randomize(transformer, 0),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    call: dict[str, Any] = {
        "height": 16 * pipeline.vae_scale_factor,
        "width": 16 * pipeline.vae_scale_factor,
        "latents": noise(1, 4, 16, 16),
        "use_resolution_binning": False,
    }
    for seed, name in enumerate(("prompt", "negative_prompt")):
        for suffix, rows in (("", 7), ("_2", 8)):
            call[f"{name}_embeds{suffix}"] = noise(1, rows, 32, seed=10 * seed + rows)
            call[f"{name}_attention_mask{suffix}"] = torch.ones(1, rows, dtype=torch.long)
    return pipeline, call
