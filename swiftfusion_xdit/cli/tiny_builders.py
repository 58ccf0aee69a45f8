"""The parts of each tiny pipeline, with a given number of attention heads."""

from __future__ import annotations

from typing import Any

from swiftfusion_xdit.cli.tiny_parts import (
    HEAD_DIM,
    TEXT_DIM,
    clip_encoder,
    flow_scheduler,
    image_vae,
    llama_encoder,
    make_tokenizer,
    qwen_encoder,
    t5_encoder,
)

# diffusers' pipeline of QwenImage wraps the prompt in words of its own and drops 34 tokens of them.
QWEN_TEMPLATE_TOKENS = 181


def build_flux(num_heads: int) -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    return {
        "scheduler": flow_scheduler(),
        "text_encoder": clip_encoder("CLIPTextModel"),
        "text_encoder_2": t5_encoder(),
        "tokenizer": make_tokenizer(77),
        "tokenizer_2": make_tokenizer(512),
        "transformer": FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=num_heads,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": image_vae(),
        "feature_extractor": None,
        "image_encoder": None,
    }


def build_sd3(num_heads: int) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": clip_encoder("CLIPTextModelWithProjection"),
        "text_encoder_2": clip_encoder("CLIPTextModelWithProjection"),
        "text_encoder_3": t5_encoder(),
        "tokenizer": make_tokenizer(77),
        "tokenizer_2": make_tokenizer(77),
        "tokenizer_3": make_tokenizer(256),
        "transformer": SD3Transformer2DModel(
            num_layers=3,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=num_heads,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=num_heads * HEAD_DIM,
            pooled_projection_dim=32,
            pos_embed_max_size=96,
            qk_norm="rms_norm",
        ),
        "vae": image_vae(),
        "feature_extractor": None,
        "image_encoder": None,
    }


def build_wan(num_heads: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    return {
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "text_encoder": t5_encoder("UMT5EncoderModel"),
        "tokenizer": make_tokenizer(512),
        "transformer": WanTransformer3DModel(
            num_attention_heads=num_heads,
            attention_head_dim=HEAD_DIM,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=2 * num_heads * HEAD_DIM,
            num_layers=2,
        ),
        "transformer_2": None,
        "vae": AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    }


def build_hunyuan_video(num_heads: int) -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoTransformer3DModel,
    )

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": llama_encoder(),
        "tokenizer": make_tokenizer(512),
        "text_encoder_2": clip_encoder("CLIPTextModel"),
        "tokenizer_2": make_tokenizer(77),
        "transformer": HunyuanVideoTransformer3DModel(
            num_attention_heads=num_heads,
            attention_head_dim=HEAD_DIM,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=TEXT_DIM,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        "vae": AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
    }


def build_qwen_image(num_heads: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    return {
        "scheduler": flow_scheduler(),
        "text_encoder": qwen_encoder(),
        "tokenizer": make_tokenizer(1024),
        "transformer": QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=num_heads,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    }


def build_cogvideox(num_heads: int) -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXTransformer3DModel,
    )

    return {
        "scheduler": CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0
        ),
        "text_encoder": t5_encoder(),
        "tokenizer": make_tokenizer(226),
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=num_heads,
            attention_head_dim=HEAD_DIM,
            time_embed_dim=32,
            text_embed_dim=TEXT_DIM,
            num_layers=2,
            use_rotary_positional_embeddings=True,
        ),
        "vae": AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
    }
