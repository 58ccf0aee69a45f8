"""QwenImage: padding, masked text, and what modulates the reference images.

xDiT pads text and image to multiples of the ranks with rows that join the keys unmasked, and it
ignores the mask of the text. Here neither is a key. Prompts of different lengths in a batch run
one after another, which is exact because samples never meet.

With ``zero_cond_t`` (QwenImage-Edit 2511) xDiT cuts the image but not the index that says which
timestep modulates a row, so that shapes clash. Here the index is cut alike.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import forwards, rows
from swiftfusion_xdit.xdit.key_rows import Ranges
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

WRAPPER = "xFuserQwenImageTransformerWrapper"

# Arguments of the wrapper's forward that have one entry a sample.
BATCHED = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "timestep",
    "img_shapes",
    "txt_seq_lens",
    "guidance",
    "additional_t_cond",
)
PARAMETERS = (
    "self",
    *BATCHED[:-1],
    "attention_kwargs",
    "controlnet_block_samples",
    "additional_t_cond",
    "return_dict",
)


def check(module: ModuleType) -> list[str]:
    block: Any = _block_class(module)
    problems = check_names(getattr(module, WRAPPER, None), "forward", PARAMETERS)
    if block is None or "modulate_index" not in inspect.signature(block.forward).parameters:
        problems.append("diffusers' QwenImageTransformerBlock.forward takes no modulate_index")
    return problems


def apply(module: ModuleType, patches: Patches) -> None:
    corrections.around(getattr(module, WRAPPER), "forward", patches, _forward)
    block = _block_class(module)
    assert block is not None
    corrections.around(block, "forward", patches, _block_forward)


def _block_class(module: ModuleType) -> type | None:
    base = getattr(module, "QwenImageTransformer2DModel", None)
    found = getattr(inspect.getmodule(base), "QwenImageTransformerBlock", None)
    return found if isinstance(found, type) else None


def _forward(session: Session, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = forwards.bind(original, self, *args, **kwargs)
    num_text = arguments["encoder_hidden_states"].shape[1]
    num_image = arguments["hidden_states"].shape[1]
    mask = arguments.pop("encoder_hidden_states_mask")
    if mask is None:
        with rows.padded_parts(session, num_text, num_image):
            return original(self, **arguments)
    masks = mask.bool().tolist()
    if any(other != masks[0] for other in masks):
        return _one_by_one(original, self, arguments, masks, session)
    with rows.parts(session, (num_text, _runs(masks[0])), (num_image, ((0, num_image),))):
        return original(self, **arguments)


def _one_by_one(
    original: Any, self: Any, arguments: dict[str, Any], masks: list[list[bool]], session: Session
) -> Any:
    num_text, num_image = len(masks[0]), arguments["hidden_states"].shape[1]
    outputs = []
    for i, mask in enumerate(masks):
        one = {name: _sample(name, value, i, len(masks)) for name, value in arguments.items()}
        with rows.parts(session, (num_text, _runs(mask)), (num_image, ((0, num_image),))):
            outputs.append(original(self, **one))
    return forwards.with_sample(outputs[0], torch.cat([output[0] for output in outputs]))


def _sample(name: str, value: Any, i: int, batch: int) -> Any:
    """Sample i of an argument of the wrapper's forward."""
    if name == "controlnet_block_samples" and value is not None:
        return [_sample("hidden_states", block, i, batch) for block in value]
    if name not in BATCHED or value is None or len(value) != batch:
        return value
    return value[i : i + 1]


def _runs(mask: list[bool]) -> Ranges:
    """Where a mask is true, as (start, stop)."""
    edges = [i for i, pair in enumerate(pairwise([False, *mask, False])) if pair[0] != pair[1]]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _block_forward(
    session: Session, original: Any, self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    index = kwargs.get("modulate_index")
    if index is not None and index.shape[1] != hidden_states.shape[1]:
        index = functional.pad(index, (0, -index.shape[1] % session.size))
        kwargs["modulate_index"] = index.chunk(session.size, dim=1)[session.rank]
    return original(self, hidden_states, *args, **kwargs)
