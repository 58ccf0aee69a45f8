"""HunyuanVideo: video rows that do not divide by the ranks, texts of different lengths.

Such rows xDiT cuts into chunks of different lengths, or into fewer chunks than ranks, and gathers
as if all were equal, which fails or mixes rows up. Here the wrapper gets the patches of the video
as one strip, a single frame that is one patch high, with empty patches at its end; what it does
to a patch does not depend on where that lies, but for the rotary embedding, which is given. The
empty patches are no keys, and are cut off again.

Text rows that only some samples of a batch have are keys of all of them in xDiT. Here such a
batch goes sample by sample.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import forwards, rows
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import OnlyKeys, Session

WRAPPER = "xFuserHunyuanVideoTransformer3DWrapper"


def check(module: ModuleType) -> list[str]:
    expected = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    more = ("pooled_projections", "guidance", "attention_kwargs", "return_dict")
    wrapper = getattr(module, WRAPPER, None)
    return check_names(wrapper, "forward", ("self", *expected, *more))


def apply(module: ModuleType, patches: Patches) -> None:
    corrections.around(getattr(module, WRAPPER), "forward", patches, _forward)


def _forward(session: Session, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = forwards.bind(original, self, *args, **kwargs)
    forward_alike = functools.partial(_forward_alike, session, original, self)
    batch = len(arguments["hidden_states"])
    mask = arguments["encoder_attention_mask"].bool()
    if not torch.equal(mask, mask[:1].expand_as(mask)):
        return forwards.sample_by_sample(forward_alike, arguments, batch)
    return forward_alike(arguments)


def _forward_alike(session: Session, original: Any, self: Any, arguments: dict[str, Any]) -> Any:
    """Of samples whose texts have the same rows."""
    video = arguments["hidden_states"]
    patch = (self.config.patch_size_t, self.config.patch_size, self.config.patch_size)
    grid = tuple(size // p for size, p in zip(video.shape[2:], patch, strict=True))
    num_video, num_text = math.prod(grid), int(arguments["encoder_attention_mask"][0].sum())
    with key_rows(session, num_video, num_text, split_text=num_text % session.size == 0):
        if num_video % session.size == 0:
            return original(self, **arguments)
        with _given_rope(self.rope, video, session):
            strip = _to_strip(video, grid, patch, -num_video % session.size)
            output = original(self, **{**arguments, "hidden_states": strip})
    return forwards.with_sample(output, _from_strip(output[0], grid, patch))


def key_rows(session: Session, num_video: int, num_text: int, *, split_text: bool) -> OnlyKeys:
    """Which keys count: padded video rows, followed by text rows unless these are joint tensors."""
    if split_text:
        return rows.padded_parts(session, num_video, num_text)
    return session.padded(num_video)


@contextlib.contextmanager
def _given_rope(rope: Any, video: Tensor, session: Session) -> Iterator[None]:
    """Inside, ``rope`` gives the padded embedding of ``video``, whatever it is called with."""
    embedding = tuple(rows.pad(part, session) for part in rope(video))
    handle = rope.register_forward_hook(lambda *_: embedding)
    try:
        yield
    finally:
        handle.remove()


def _to_strip(video: Tensor, grid: tuple[int, ...], patch: tuple[int, ...], padding: int) -> Tensor:
    """``[b, c, frames, height, width]`` to ``[b, c, p_t, p_h, (patches + padding) * p_w]``."""
    (f, h, w), (p_t, p_h, p_w) = grid, patch
    video = video[:, :, : f * p_t, : h * p_h, : w * p_w]
    patches = video.unflatten(4, (w, p_w)).unflatten(3, (h, p_h)).unflatten(2, (f, p_t))
    strip = patches.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)
    return functional.pad(strip, (0, padding * p_w))


def _from_strip(strip: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`_to_strip`, without the padding."""
    patches = strip[..., : math.prod(grid) * patch[2]].unflatten(4, (*grid, patch[2]))
    return patches.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(6).flatten(4, 5).flatten(2, 3)
