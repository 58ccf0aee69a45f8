"""Tiny CogVideoX."""

from __future__ import annotations

from typing import Any

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, randomize, run_pipeline

TITLE = "CogVideoX"
FEATURES = ("even", "uneven image", "uneven text")
REFUSED_BY_XDIT = {"uneven image": "height of the input is not divisible"}


def run(feature: str, **arguments: Any) -> float | None:
    return run_pipeline("xFuserCogVideoXPipeline", lambda: build(feature), **arguments)


def build(feature: str) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    height, text = sizes(feature)
    transformer = CogVideoXTransformer3DModel(
        **transformer_config(height, text),
        in_channels=4,
        use_rotary_positional_embeddings=False,
    )
    pipeline = CogVideoXPipeline(
        transformer=randomize(transformer, 0),
        scheduler=CogVideoXDDIMScheduler(),
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
    )
    call = {
        "height": height * pipeline.vae_scale_factor_spatial,
        "width": 8 * pipeline.vae_scale_factor_spatial,
        "num_frames": 5,
        "prompt_embeds": noise(1, text, 32, seed=2),
        "negative_prompt_embeds": noise(1, text, 32, seed=3),
        "latents": noise(1, 2, 4, height, 8),
    }
    return pipeline, call


def sizes(feature: str) -> tuple[int, int]:
    """Rows of the latents, and tokens of the text."""
    return 6 if feature == "uneven image" else 8, 15 if feature == "uneven text" else 16


def transformer_config(height: int, text: int) -> dict[str, Any]:
    """What transformers of this family have alike."""
    return {
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": HEAD_DIM,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": height,
        "sample_frames": 5,
        "patch_size": 2,
        "max_text_seq_length": text,
    }


def tiny_vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
