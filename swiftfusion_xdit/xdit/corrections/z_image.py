"""Z-Image: padding, and prompts of different lengths in a batch.

xDiT passes no mask to attention. So the rows that it appends to divide by the ranks join the keys,
three times a pass: of the image, of the prompt and of both. Here they are no keys. Where prompts
or images of a batch differ in length, the rows that fill up the shorter ones join the keys too:
such samples run one after another, which is exact because samples never meet.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import forwards, rows
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

WRAPPER = "xFuserZImageTransformer2DWrapper"


def check(module: ModuleType) -> list[str]:
    wrapper = getattr(module, WRAPPER, None)
    arguments = ("self", "x", "t", "cap_feats", "patch_size", "f_patch_size", "return_dict")
    cut = ("self", "x", "sp_world_rank", "sp_world_size", "pad_amount", "dim")
    return [
        *check_names(wrapper, "forward", arguments),
        *check_names(wrapper, "_chunk_and_pad_sequence", cut),
        *check_names(module, "get_classifier_free_guidance_world_size", ()),
    ]


def apply(module: ModuleType, patches: Patches) -> None:
    def forward(
        session: Session,
        original: Any,
        self: Any,
        x: list[Tensor],
        t: Tensor,
        cap_feats: list[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        num_cfg = module.get_classifier_free_guidance_world_size()
        with session.only_keys(0, []):  # what _cut sets ends here
            if _are_alike(x) and _are_alike(cap_feats):
                return original(self, x, t, cap_feats, *args, **kwargs)
            step = len(x) // num_cfg
            groups = [slice(i, None, step) for i in range(step)]
            outputs = [
                original(self, x[group], t[group], cap_feats[group], *args, **kwargs)
                for group in groups
            ]
        samples: list[Any] = [None] * len(x)
        for group, output in zip(groups, outputs, strict=True):
            samples[group] = output[0]
        return forwards.with_sample(outputs[0], samples)

    wrapper = getattr(module, WRAPPER)
    corrections.around(wrapper, "forward", patches, forward)
    corrections.around(wrapper, "_chunk_and_pad_sequence", patches, _cut)


def _are_alike(tensors: list[Tensor]) -> bool:
    return all(tensor.shape == tensors[0].shape for tensor in tensors)


def _cut(session: Session, original: Any, self: Any, x: Tensor, *args: Any, dim: int) -> Tensor:
    # The blocks that follow attend these rows, until the next sequence is cut.
    session.key_rows = rows.padded_parts(session, x.shape[dim]).key_rows
    return original(self, x, *args, dim=dim)
