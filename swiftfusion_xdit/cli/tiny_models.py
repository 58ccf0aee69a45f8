"""Tiny random checkpoints, tokenizers included, in the layout that xDiT loads by name.

Nothing is downloaded: every part is built from a configuration with seeded random weights. A
checkpoint has the real architecture and is only small, so xDiT runs the code that it runs for the
real one. xDiT finds it because a directory of the model's name under the working directory comes
before any hub.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HEAD_DIM = 16
MIN_HEADS = 6
TEXT_DIM = 32
VIDEO_FRAMES = 5
# Pixels per token: the VAE halves three times and the transformer takes patches of 2 x 2.
PIXELS_PER_TOKEN = 16
_WEIGHT_SCALE = 0.06


@dataclass(frozen=True)
class TinyModel:
    """A model that the demo can run.

    `checkpoint` is the name that xDiT's `--model` takes and the directory that it loads;
    `arguments` are further runner arguments, `{text_tokens}` in them standing for a text length.
    """

    name: str
    checkpoint: str
    arguments: tuple[str, ...]
    is_video: bool
    build: Callable[[int], dict[str, Any]]
    pipeline: str

    def num_tokens(self, size: int) -> int:
        """Image tokens of a `size` x `size` picture (or of the whole video)."""
        frames = (VIDEO_FRAMES - 1) // 4 + 1 if self.is_video else 1
        return frames * (size // PIXELS_PER_TOKEN) ** 2


def choose_num_heads(num_ranks: int, num_machines: int) -> int:
    """A head count at which both layouts can show what they are for.

    The paper's rule `gcd(ranks, heads)` (section on degrees) shall give one Ulysses rank to each
    machine, and stock Ulysses inside a machine needs heads that divide by its ranks. Where no count
    does both, it is one that divides by either.
    """
    per_machine = num_ranks // num_machines
    for heads in range(MIN_HEADS, 4 * num_ranks + MIN_HEADS):
        if math.gcd(num_ranks, heads) == num_machines and heads % per_machine == 0:
            return heads
    unit = math.lcm(num_machines, per_machine)
    return unit * math.ceil(MIN_HEADS / unit)


def make_checkpoint(model: TinyModel, root: Path, *, num_heads: int, seed: int = 0) -> Path:
    """Write `model` with `num_heads` heads under `root`; return the checkpoint's directory.

    The same arguments give the same weights: the seed is local and the caller's random state stays.
    """
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    path = root / model.checkpoint
    path.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": model.pipeline}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = model.build(num_heads)
        for name, part in parts.items():
            if part is None:
                index[name] = [None, None]
            else:
                _save_part(part, path / name)
                index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    (path / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return path


def _save_part(part: Any, path: Path) -> None:
    import torch

    if isinstance(part, torch.nn.Module):
        _randomize(part)
    part.save_pretrained(path)


def _randomize(module: torch.nn.Module) -> None:
    """Weights at which every layer matters: default initialisation leaves some of them at zero."""
    import torch

    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() > 1:
                fan_in = weight[0].numel()
                weight.normal_(std=max(_WEIGHT_SCALE, fan_in**-0.5))
            elif not name.endswith("weight"):
                weight.normal_(std=_WEIGHT_SCALE)


def make_tokenizer(max_length: int) -> Any:
    """A tokenizer whose tokens are bytes: any prompt works and no vocabulary is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
    )


_VOCAB_SIZE = 4 + 256


def _t5_encoder(encoder_class: str = "T5EncoderModel") -> Any:
    import transformers

    config_class = transformers.UMT5Config if "UMT5" in encoder_class else transformers.T5Config
    config = config_class(
        vocab_size=_VOCAB_SIZE,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return getattr(transformers, encoder_class)(config).eval()


def _clip_encoder(encoder_class: str, *, hidden: int = 16) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=32,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return getattr(transformers, encoder_class)(config).eval()


def _image_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _flow_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def _build_flux(num_heads: int) -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    return {
        "scheduler": _flow_scheduler(),
        "text_encoder": _clip_encoder("CLIPTextModel"),
        "text_encoder_2": _t5_encoder(),
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
        "vae": _image_vae(),
        "feature_extractor": None,
        "image_encoder": None,
    }


def _build_sd3(num_heads: int) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": _clip_encoder("CLIPTextModelWithProjection"),
        "text_encoder_2": _clip_encoder("CLIPTextModelWithProjection"),
        "text_encoder_3": _t5_encoder(),
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
        "vae": _image_vae(),
        "feature_extractor": None,
        "image_encoder": None,
    }


def _build_wan(num_heads: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    return {
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "text_encoder": _t5_encoder("UMT5EncoderModel"),
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


MODELS = {
    model.name: model
    for model in (
        TinyModel(
            "flux",
            "black-forest-labs/FLUX.1-dev",
            ("--max_sequence_length", "{text_tokens}"),
            False,
            _build_flux,
            "FluxPipeline",
        ),
        TinyModel(
            "wan",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            ("--num_frames", str(VIDEO_FRAMES)),
            True,
            _build_wan,
            "WanPipeline",
        ),
        TinyModel(
            "sd3",
            "stabilityai/stable-diffusion-3.5-large",
            (),
            False,
            _build_sd3,
            "StableDiffusion3Pipeline",
        ),
    )
}
