"""Tiny SD3."""

from __future__ import annotations

from typing import Any

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, randomize, run_pipeline

TITLE = "Stable Diffusion 3"
FEATURES = ("even", "uneven image", "uneven text")
REFUSED_BY_XDIT = {"uneven image": "num_sp_patches"}


def run(feature: str, **arguments: Any) -> float | None:
    return run_pipeline("xFuserStableDiffusion3Pipeline", lambda: build(feature), **arguments)


def _tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def build(
    feature: str, *, dual_attention_layers: tuple[int, ...] = ()
) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=32,
        caption_projection_dim=NUM_HEADS * HEAD_DIM,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=dual_attention_layers,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=randomize(transformer, 0),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    height = 12 if feature == "uneven image" else 16
    text = 15 if feature == "uneven text" else 16
    call = {
        "height": height * pipeline.vae_scale_factor,
        "width": 16 * pipeline.vae_scale_factor,
        "prompt_embeds": noise(1, text, 32, seed=2),
        "negative_prompt_embeds": noise(1, text, 32, seed=3),
        "pooled_prompt_embeds": noise(1, 32, seed=4),
        "negative_pooled_prompt_embeds": noise(1, 32, seed=5),
        "latents": noise(1, 4, height, 16),
    }
    return pipeline, call
