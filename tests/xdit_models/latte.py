"""Tiny Latte: attention within frames, and across them."""

from __future__ import annotations

from typing import Any

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, randomize, run_pipeline

TITLE = "Latte"
FEATURES = ("even",)


def run(feature: str, **arguments: Any) -> float | None:
    return run_pipeline("xFuserLattePipeline", build, **arguments)


def build() -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel

    transformer = LatteTransformer3DModel(
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=NUM_HEADS * HEAD_DIM,
        caption_channels=32,
        sample_size=16,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        num_embeds_ada_norm=1000,
        video_length=4,
    )
    pipeline = LattePipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
        transformer=randomize(transformer, 0),
        scheduler=DDIMScheduler(),
    )
    call = {
        "height": 16 * pipeline.vae_scale_factor,
        "width": 16 * pipeline.vae_scale_factor,
        "video_length": 4,
        "prompt_embeds": noise(1, 15, 32, seed=2),
        "negative_prompt_embeds": noise(1, 15, 32, seed=3),
        "negative_prompt": None,
        "latents": noise(1, 4, 4, 16, 16),
    }
    return pipeline, call
