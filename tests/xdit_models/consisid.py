"""Tiny ConsisID: CogVideoX with rotary embeddings, an image, and a face that its rows attend."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, randomize, run_pipeline
from tests.xdit_models import cogvideox

TITLE = "ConsisID"
FEATURES = ("even", "uneven image", "uneven text")
REFUSED_BY_XDIT = {"uneven image": "height of the input is not divisible"}


def run(feature: str, **arguments: Any) -> float | None:
    return run_pipeline("xFuserConsisIDPipeline", lambda: build(feature), **arguments)


def build(feature: str) -> tuple[Any, dict[str, Any]]:
    from diffusers import CogVideoXDDIMScheduler, ConsisIDTransformer3DModel

    # Without OpenCV, which only draws key points, diffusers exports a stand-in by this name.
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    height, text = cogvideox.sizes(feature)
    transformer = ConsisIDTransformer3DModel(
        **cogvideox.transformer_config(height, text),
        in_channels=8,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=1,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=16,
        LFE_vit_dim=16,
        LFE_depth=5,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_querie=4,
        LFE_output_dim=NUM_HEADS * HEAD_DIM * 2 // 3,
    )
    pipeline = ConsisIDPipeline(
        transformer=randomize(transformer, 0),
        scheduler=CogVideoXDDIMScheduler(),
        vae=randomize(cogvideox.tiny_vae(), 1),
        text_encoder=None,
        tokenizer=None,
    )
    scale = pipeline.vae_scale_factor_spatial
    call = {
        "image": noise(1, 3, height * scale, 8 * scale, seed=4).clamp(-1, 1) / 2 + 0.5,
        "height": height * scale,
        "width": 8 * scale,
        "num_frames": 5,
        "prompt_embeds": noise(1, text, 32, seed=2),
        "negative_prompt_embeds": noise(1, text, 32, seed=3),
        "latents": noise(1, 2, 4, height, 8),
        "id_cond": noise(1, 16, seed=5),
        "id_vit_hidden": [noise(1, 9, 16, seed=6 + i) for i in range(5)],
        "generator": torch.Generator().manual_seed(7),
    }
    return pipeline, call
