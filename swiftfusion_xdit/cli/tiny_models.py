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

from swiftfusion_xdit.cli import tiny_builders

if TYPE_CHECKING:
    import torch

PROMPT = "a torus of light above a quiet sea"
MIN_HEADS = 6
VIDEO_FRAMES = 5
# Pixels per token: the VAE halves three times and the transformer takes patches of 2 x 2.
PIXELS_PER_TOKEN = 16
_WEIGHT_SCALE = 0.06


@dataclass(frozen=True)
class TinyModel:
    """A model that the demo can run.

    `checkpoint` is the name that xDiT's `--model` takes and the directory that it loads;
    `arguments` are further runner arguments, `{text_tokens}` in them standing for a text length.
    `template_tokens` is not zero where the pipeline neither pads nor cuts the text: the number of
    text rows is that plus the bytes of the prompt.
    """

    name: str
    checkpoint: str
    arguments: tuple[str, ...]
    is_video: bool
    build: Callable[[int], dict[str, Any]]
    pipeline: str
    template_tokens: int = 0

    def num_tokens(self, size: int) -> int:
        """Image tokens of a `size` x `size` picture (or of the whole video)."""
        frames = (VIDEO_FRAMES - 1) // 4 + 1 if self.is_video else 1
        return frames * (size // PIXELS_PER_TOKEN) ** 2

    def prompt(self, num_ranks: int) -> str:
        """A prompt whose text rows divide by the ranks where the pipeline leaves that to it."""
        if not self.template_tokens:
            return PROMPT
        return PROMPT + "." * (-(self.template_tokens + len(PROMPT)) % num_ranks)


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


_VIDEO = ("--num_frames", str(VIDEO_FRAMES))

# Those that xDiT's runner knows by name.
MODELS = {
    model.name: model
    for model in (
        TinyModel(
            "flux",
            "black-forest-labs/FLUX.1-dev",
            ("--max_sequence_length", "{text_tokens}"),
            False,
            tiny_builders.build_flux,
            "FluxPipeline",
        ),
        TinyModel(
            "wan",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            _VIDEO,
            True,
            tiny_builders.build_wan,
            "WanPipeline",
        ),
        TinyModel(
            "sd3",
            "stabilityai/stable-diffusion-3.5-large",
            (),
            False,
            tiny_builders.build_sd3,
            "StableDiffusion3Pipeline",
        ),
        TinyModel(
            "hunyuan_video",
            "tencent/HunyuanVideo",
            _VIDEO,
            True,
            tiny_builders.build_hunyuan_video,
            "HunyuanVideoPipeline",
        ),
        TinyModel(
            "qwen_image",
            "Qwen/Qwen-Image",
            (),
            False,
            tiny_builders.build_qwen_image,
            "QwenImagePipeline",
            template_tokens=tiny_builders.QWEN_TEMPLATE_TOKENS,
        ),
    )
}

# xDiT has a pipeline for it, which its runner does not know.
COGVIDEOX = TinyModel(
    "cogvideox",
    "zai-org/CogVideoX-2b",
    _VIDEO,
    True,
    tiny_builders.build_cogvideox,
    "CogVideoXPipeline",
)


def find(name: str) -> TinyModel:
    return COGVIDEOX if name == COGVIDEOX.name else MODELS[name]
