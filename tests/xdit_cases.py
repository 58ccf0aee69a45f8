"""Tiny random models, run by diffusers in one process and by xDiT's own wrappers on many ranks.

Functions that ranks run (see tests.distributed) live here; each leaves no group of xDiT behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

NUM_HEADS = 6  # not a multiple of 4: under torus head groups may be uneven
HEAD_DIM = 16
NUM_STEPS = 2


@contextlib.contextmanager
def xdit_groups() -> Iterator[None]:
    """Inside, xDiT's world group exists; its model-parallel groups are gone afterwards."""
    from xfuser.core.distributed import init_distributed_environment, parallel_state

    init_distributed_environment()
    try:
        yield
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()


def start(pipeline: Any, **arguments: Any) -> Any:
    """A runtime state of xDiT for ``pipeline``; returns the engine config."""
    import xfuser
    from xfuser.core.distributed import initialize_runtime_state

    config, _ = xfuser.xFuserArgs(model="tiny", **arguments).create_config()
    initialize_runtime_state(pipeline, config)
    return config


class Holder:
    """As much of a pipeline as xDiT's runtime state looks at."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Seeded weights in place of initial ones, some of which are zero and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux() -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper,
    )

    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": NUM_HEADS,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    side, text = 8, 16
    image_ids = torch.zeros(side, side, 3)
    image_ids[..., 1] += torch.arange(side)[:, None]
    image_ids[..., 2] += torch.arange(side)[None, :]
    inputs = {
        "hidden_states": noise(1, side * side, 16),
        "encoder_hidden_states": noise(1, text, 32, seed=2),
        "pooled_projections": noise(1, 32, seed=3),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }
    return xFuserFlux1Transformer2DWrapper, config, inputs


def wan() -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_wan import (
        xFuserWanTransformer3DWrapper,
    )

    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    inputs = {
        "hidden_states": noise(1, 4, 3, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 16, 32, seed=2),
    }
    return xFuserWanTransformer3DWrapper, config, inputs


def hunyuan_video() -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_hunyuan_video import (
        xFuserHunyuanVideoTransformer3DWrapper,
    )

    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": NUM_HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 32,
        "rope_axes_dim": (4, 6, 6),
        "guidance_embeds": True,
    }
    inputs = {
        "hidden_states": noise(1, 4, 3, 8, 8),
        "timestep": torch.tensor([500]),
        # 15 does not divide: xDiT then passes the text as joint tensors.
        "encoder_hidden_states": noise(1, 15, 32, seed=2),
        "encoder_attention_mask": torch.ones(1, 15, dtype=torch.long),
        "pooled_projections": noise(1, 32, seed=3),
        "guidance": torch.tensor([6000.0]),
    }
    return xFuserHunyuanVideoTransformer3DWrapper, config, inputs


def qwen_image() -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_qwen import (
        xFuserQwenImageTransformerWrapper,
    )

    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": NUM_HEADS,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    inputs = {
        "hidden_states": noise(1, 64, 16),
        "encoder_hidden_states": noise(1, 16, 32, seed=2),
        "encoder_hidden_states_mask": torch.ones(1, 16, dtype=torch.long),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 8, 8)]],
    }
    return xFuserQwenImageTransformerWrapper, config, inputs


TRANSFORMERS: dict[str, Callable[[], tuple[type, dict[str, Any], dict[str, Any]]]] = {
    "flux": flux,
    "wan": wan,
    "hunyuan_video": hunyuan_video,
    "qwen_image": qwen_image,
}


def _tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def sd3() -> tuple[Any, dict[str, Any]]:
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
    call = {
        "height": 16 * pipeline.vae_scale_factor,
        "width": 16 * pipeline.vae_scale_factor,
        "prompt_embeds": noise(1, 15, 32, seed=2),
        "negative_prompt_embeds": noise(1, 15, 32, seed=3),
        "pooled_prompt_embeds": noise(1, 32, seed=4),
        "negative_pooled_prompt_embeds": noise(1, 32, seed=5),
        "latents": noise(1, 4, 16, 16),
    }
    return pipeline, call


def cogvideox() -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=15,
        use_rotary_positional_embeddings=False,
    )
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipeline = CogVideoXPipeline(
        transformer=randomize(transformer, 0),
        scheduler=CogVideoXDDIMScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    call = {
        "height": 8 * pipeline.vae_scale_factor_spatial,
        "width": 8 * pipeline.vae_scale_factor_spatial,
        "num_frames": 5,
        "prompt_embeds": noise(1, 15, 32, seed=2),
        "negative_prompt_embeds": noise(1, 15, 32, seed=3),
        "latents": noise(1, 2, 4, 8, 8),
    }
    return pipeline, call


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sd3": sd3,
    "cogvideox": cogvideox,
}
MODELS = (*TRANSFORMERS, *PIPELINES)


def relative_difference(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape, (out.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def run_model(name: str, **arguments: Any) -> float | None:
    """How far xDiT's wrapper, on this rank and its peers, is from diffusers in one process.

    None on a rank to which xDiT gives no result.
    """
    run = run_transformer if name in TRANSFORMERS else run_pipeline
    with xdit_groups(), torch.no_grad():
        return run(name, **arguments)


def run_transformer(name: str, **arguments: Any) -> float:
    wrapper_class, config, inputs = TRANSFORMERS[name]()
    plain_class = wrapper_class.__mro__[1]
    plain = randomize(plain_class(**config), 0)
    expected = plain(**inputs, return_dict=False)[0]
    start(Holder(plain), **arguments)
    describe_text(inputs["encoder_hidden_states"].shape[1])
    # Some install their attention processors in from_config alone.
    wrapper = wrapper_class.from_config(config).eval()
    wrapper.load_state_dict(plain.state_dict())
    return relative_difference(wrapper(**inputs, return_dict=False)[0], expected)


def describe_text(num_tokens: int) -> None:
    """What xDiT's runner tells the runtime state before it calls a transformer."""
    from xfuser.core.distributed import get_runtime_state, get_sequence_parallel_world_size

    state = get_runtime_state()
    state.max_condition_sequence_length = num_tokens
    state.split_text_embed_in_sp = num_tokens % get_sequence_parallel_world_size() == 0


def run_pipeline(name: str, **arguments: Any) -> float | None:
    import xfuser

    pipeline, call = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": NUM_STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    expected = pipeline(**call, **common, return_dict=False)[0]
    pipeline, call = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: call[key] for key in ("height", "width", "num_frames") if key in call} | {
        "num_inference_steps": NUM_STEPS,
        "output_type": "latent",
        **arguments,
    }
    config, _ = xfuser.xFuserArgs(model="tiny", **arguments).create_config()
    wrapper = {
        "sd3": xfuser.xFuserStableDiffusion3Pipeline,
        "cogvideox": xfuser.xFuserCogVideoXPipeline,
    }[name](pipeline, config)
    out = wrapper(**call, **common, return_dict=False)
    # xDiT hands the result out on the last rank of a data-parallel group only.
    if out is None or not isinstance(out[0], Tensor):
        return None
    return relative_difference(out[0], expected)
