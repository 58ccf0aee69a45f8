"""HunyuanVideo 1.5: padding of video and text, texts of different lengths.

xDiT's zero rows at the end of the video are unmasked keys, and so are those at the end of the
text that it adds for sparse attention. Here they are no keys. Text rows that only some samples of
a batch have are keys of all of them in xDiT; here such a batch goes sample by sample.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any

from torch import Tensor

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import forwards
from swiftfusion_xdit.xdit.corrections.hunyuan_video import key_rows
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

WRAPPER = "xFuserHunyuanVideo15Transformer3DWrapper"


def check(module: ModuleType) -> list[str]:
    wrapper = getattr(module, WRAPPER, None)
    padding = ("self", "x", "sp_world_rank", "sp_world_size", "pad_amount", "dim")
    text = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    more = ("timestep_r", "encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds")
    return [
        *check_names(wrapper, "_chunk_and_pad_sequence", padding),
        *check_names(wrapper, "forward", ("self", *text, *more, "attention_kwargs", "return_dict")),
    ]


def apply(module: ModuleType, patches: Patches) -> None:
    corrections.around(getattr(module, WRAPPER), "forward", patches, _forward)


def _forward(session: Session, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = forwards.bind(original, self, *args, **kwargs)
    forward_alike = functools.partial(_forward_alike, session, original, self)
    batch = len(arguments["hidden_states"])
    if len(set(_text_rows(arguments))) > 1:
        return forwards.sample_by_sample(forward_alike, arguments, batch)
    return forward_alike(arguments)


def _forward_alike(session: Session, original: Any, self: Any, arguments: dict[str, Any]) -> Any:
    """Of samples with as many text rows each."""
    patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
    sizes = arguments["hidden_states"].shape[2:]
    num_video = math.prod(size // p for size, p in zip(sizes, patch, strict=True))
    num_text = _text_rows(arguments)[0]
    split_text = num_text % session.size == 0 or self.attention_kwargs is not None
    with key_rows(session, num_video, num_text, split_text=split_text):
        return original(self, **arguments)


def _text_rows(arguments: dict[str, Any]) -> list[int]:
    """How many rows of text and image condition each sample has; xDiT puts them first."""
    image: Tensor = arguments["image_embeds"]
    masks = arguments["encoder_attention_mask"], arguments["encoder_attention_mask_2"]
    num_rows = sum(mask.bool().sum(dim=1) for mask in masks)
    return (num_rows + bool(image.any()) * image.shape[1]).tolist()
