"""Tiny Sana: linear self-attention, which is not USP, and cross-attention to the text, which is."""

from __future__ import annotations

from typing import Any

import torch

from tests.long_context import real_classes
from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, randomize, run_pipeline

TITLE = "Sana"
FEATURES = ("even",)


def run(feature: str, **arguments: Any) -> float | None:
    with real_classes():
        return run_pipeline("xFuserSanaPipeline", build, **arguments)


def build() -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_cross_attention_heads=NUM_HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=NUM_HEADS * HEAD_DIM,
        caption_channels=32,
        sample_size=8,
        patch_size=1,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=[1] * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipeline = SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=randomize(transformer, 0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    mask = torch.ones(1, 12)
    call = {
        "height": 8 * pipeline.vae_scale_factor,
        "width": 8 * pipeline.vae_scale_factor,
        "prompt_embeds": noise(1, 12, 32, seed=2),
        "negative_prompt_embeds": noise(1, 12, 32, seed=3),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "negative_prompt": None,
        "latents": noise(1, 4, 8, 8),
        "use_resolution_binning": False,
    }
    return pipeline, call
