"""Tiny Z-Image."""

from __future__ import annotations

from typing import Any

import torch

from tests.xdit_cases import HEAD_DIM, NUM_HEADS, noise, run_transformer

TITLE = "Z-Image"
# The model itself pads image and text to multiples of 32 rows, and attends those.
FEATURES = ("even", "masked text")


def run(feature: str, **arguments: Any) -> float:
    return run_transformer(*build(feature), **arguments)


def build(feature: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    from xfuser.model_executor.models.transformers.transformer_z_image import (
        xFuserZImageTransformer2DWrapper,
    )

    lengths = (40, 7) if feature == "masked text" else (40,)
    config = {
        "in_channels": 4,
        "dim": HEAD_DIM * NUM_HEADS,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": NUM_HEADS,
        "n_kv_heads": NUM_HEADS,
        "cap_feat_dim": 32,
        "axes_dims": [4, 6, 6],
        "axes_lens": [128, 32, 32],
    }
    inputs = {
        "x": [noise(4, 1, 14, 14, seed=i) for i, _ in enumerate(lengths)],
        "t": torch.full((len(lengths),), 0.5),
        "cap_feats": [noise(length, 32, seed=length) for length in lengths],
    }
    return xFuserZImageTransformer2DWrapper, config, inputs
