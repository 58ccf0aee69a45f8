"""FLUX.1-dev with random weights on disk, as diffusers lays a pipeline out.

The transformer (12B parameters, 24 GB) and the VAE are those of FLUX.1-dev but for their weights.
The text encoders are small stand-ins that give rows of the widths which the transformer takes.
Each part's weights are drawn where there is a GPU, shard by shard, and never all in memory at once.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.image_config import MODEL, Settings
from benchmarks.step_models import flux
from swiftfusion_xdit.cli.tiny_models import MODELS, make_checkpoint
from swiftfusion_xdit.cli.tiny_parts import (
    clip_encoder,
    flow_scheduler,
    make_tokenizer,
    t5_encoder,
)

SEED = 1234
# What the weights follow from, written first; and the list of parts, written last.
RECIPE, INDEX = "recipe.json", "model_index.json"
SHARD_BYTES = 4 * 10**9
SPARE_BYTES = 2 * 10**9
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
NORM_WEIGHT = 1.5  # of q and k: attention sharp enough for errors in it to show in the image


def recipe_of(settings: Settings) -> dict[str, Any]:
    """What the weights follow from."""
    if settings.tiny:
        return {"model": "the demo's tiny FLUX", "heads": settings.heads}
    return {"model": flux.TITLE, "seed": SEED, "norm_weight": NORM_WEIGHT, "text": "stand-ins"}


def ensure(settings: Settings) -> str:
    """Make the checkpoint under ``settings.checkpoint`` unless it is there; what its weights are.

    A checkpoint that was put there by other means is used as it is.

    Raises:
        ValueError: the one that is there was made here, of other settings.
    """
    path = settings.checkpoint / MODEL
    wanted = recipe_of(settings)
    if (path / INDEX).exists():
        if not (path / RECIPE).exists():
            return f"of {path}, not made by this benchmark"
        found = json.loads((path / RECIPE).read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(
                f"--checkpoint must be another directory: {path} was made with {found}, and now "
                f"{wanted} is asked for"
            )
        return f"random: {wanted}"
    path.mkdir(parents=True, exist_ok=True)
    (path / RECIPE).write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    if settings.tiny:
        make_checkpoint(MODELS["flux"], settings.checkpoint, num_heads=settings.heads)
    else:
        make_full(path)
    return f"random: {wanted}"


def make_full(
    path: Path, *, config: dict[str, Any] = flux.CONFIG, vae: dict[str, Any] = VAE
) -> None:
    """Write the whole pipeline; its index comes last and says that all is there."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    needed = write_part(path / "transformer", FluxTransformer2DModel, config)
    print(f"{needed / 1e9:.1f} GB of transformer in {path}", file=sys.stderr)
    write_part(path / "vae", AutoencoderKL, vae)
    small = {
        "scheduler": flow_scheduler(),
        "text_encoder": stand_in(
            lambda: clip_encoder("CLIPTextModel", hidden=config["pooled_projection_dim"])
        ),
        "text_encoder_2": stand_in(lambda: t5_encoder(hidden=config["joint_attention_dim"])),
        "tokenizer": make_tokenizer(77),
        "tokenizer_2": make_tokenizer(512),
    }
    index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    for name, part in small.items():
        part.save_pretrained(path / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    for name, kind in (("transformer", FluxTransformer2DModel), ("vae", AutoencoderKL)):
        index[name] = ["diffusers", kind.__name__]
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def stand_in(make: Callable[[], Any]) -> Any:
    """A text encoder of the demo's, with seeded weights in bfloat16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make().to(torch.bfloat16)


def write_part(path: Path, kind: Any, config: dict[str, Any]) -> int:
    """Write a diffusers model of bfloat16 weights, in shards; the bytes of all of them."""
    with torch.device("meta"):
        model = kind(**config)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    total = 2 * sum(shape.numel() for shape in shapes.values())
    model.save_config(path)
    warn_of_full_disk(path, total)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(SEED)
    shards = list(split(shapes, SHARD_BYTES))
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: draw(name, shapes[name], generator).cpu() for name in names}
        save_file(tensors, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    text = json.dumps(index, indent=2) + "\n"
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(text, encoding="utf-8")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return total


def split(shapes: dict[str, torch.Size], most_bytes: int) -> Iterator[list[str]]:
    """Names of the weights of each shard, in order; a weight above the limit has one for itself."""
    names: list[str] = []
    used = 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if names and used + size > most_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    if names:
        yield names


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Weights at which every layer matters and the scale of what passes through stays."""
    weight = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    if weight.dim() > 1:
        return weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    if name.endswith("bias"):
        return weight.normal_(0, 0.02, generator=generator)
    of_attention = any(part in name for part in ("norm_q", "norm_k", "norm_added"))
    return weight.fill_(NORM_WEIGHT if of_attention else 1.0)


def warn_of_full_disk(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if free < needed + SPARE_BYTES:
        print(
            f"warning: {path} needs {needed / 1e9:.1f} GB and has {free / 1e9:.1f} GB free; "
            "--checkpoint names another place",
            file=sys.stderr,
        )
