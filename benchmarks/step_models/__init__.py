"""The transformers that model_step.py measures, one module each: at full size, and tiny for CPUs.

A model's module has

    TITLE        its name
    CONFIG, TINY constructor arguments of diffusers' class
    SIZES        Latents by the name of a size; ``parse`` may take others
    TINY_SIZES   the sizes of the tiny model
    RUNNER       (module, class) of xDiT's runner, which knows how it is compiled, or None
    BLOCKS       the attributes with its blocks, for ``--compile blocks``
    build        build(config): the model, not yet xDiT's where xDiT wraps an object
    wrap         wrap(model): xDiT's, inside its groups; `as_built` where it is that already
    inputs       inputs(config, latents, make): what a step is called with, on this rank
    prepare      prepare(state, latents): tells xDiT's runtime state what its pipeline would
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

NAMES = ("flux", "cogvideox", "wan", "hunyuan_video")


@dataclass(frozen=True)
class Latents:
    """The sizes of a step: latents ``frames x height x width``, and rows of text."""

    frames: int
    height: int
    width: int
    text: int

    @property
    def size(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def image_tokens(self) -> int:
        """Rows of patches of 2 x 2."""
        return self.frames * (self.height // 2) * (self.width // 2)


@dataclass
class Make:
    """Makes a step's inputs, the same on all ranks."""

    rank: int
    ranks: int
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def noise(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        dist.broadcast(x, src=0)  # GPUs of different kinds draw different numbers
        return x

    def mine(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part."""
        return x.chunk(self.ranks, dim=dim)[self.rank].contiguous()


def as_built(model: nn.Module) -> nn.Module:
    """For `wrap`."""
    return model


def load(name: str) -> Any:
    """The module of a model.

    Raises:
        ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"--model must be one of {', '.join(NAMES)}, got {name}")
    return importlib.import_module(f"{__name__}.{name}")


def latents_of(model: ModuleType, size: str, *, tiny: bool) -> Latents:
    """Raises ValueError: the model has no such size."""
    known: dict[str, Latents] = model.TINY_SIZES if tiny else model.SIZES
    if size in known:
        return known[size]
    parse = getattr(model, "parse", None)
    if parse is None:
        raise ValueError(f"--sizes of {model.TITLE} are {', '.join(known)}, got {size}")
    return parse(size, next(iter(known.values())).text)
