"""Records the latents of a launch, so that two launches can be compared exactly.

Only while SWIFTFUSION_REPORT_DIR is set. An image holds eight bits a channel and a video is
compressed, so both hide small differences; the latents that enter the VAE hide none. Every rank
that decodes writes DIR/latents_rank{global_rank}.npy. SWIFTFUSION_REPORT_DTYPE=float32 casts the
loaded pipeline first: xDiT's runner always loads bfloat16, whose rounding is larger than the
differences that are looked for.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftfusion_xdit import envs
from swiftfusion_xdit.xdit.patches import Patches

_MARK = "_swiftfusion_captured"


def install(patches: Patches) -> None:
    """Let every diffusers pipeline that is moved to its device record its latents from then on.

    Does nothing where SWIFTFUSION_REPORT_DIR is not set.
    """
    directory = envs.get("REPORT_DIR")
    if directory is None:
        return
    from diffusers import DiffusionPipeline

    original = DiffusionPipeline.to

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        pipeline = original(self, *args, **kwargs)
        dtype = envs.get("REPORT_DTYPE")
        if dtype is not None:
            pipeline = original(pipeline, getattr(torch, dtype))
        _record_decode(pipeline, Path(directory))
        return pipeline

    patches.set(DiffusionPipeline, "to", to)


def _record_decode(pipeline: Any, directory: Path) -> None:
    vae = getattr(pipeline, "vae", None)
    if vae is None or hasattr(vae.decode, _MARK):
        return
    decode = vae.decode
    path = directory / f"latents_rank{os.environ.get('RANK', '0')}.npy"

    @functools.wraps(decode)
    def recorded(latents: Any, *args: Any, **kwargs: Any) -> Any:
        directory.mkdir(parents=True, exist_ok=True)
        np.save(path, latents.detach().float().cpu().numpy(), allow_pickle=False)
        return decode(latents, *args, **kwargs)

    setattr(recorded, _MARK, True)
    vae.decode = recorded
