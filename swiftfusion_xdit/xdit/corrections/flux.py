"""FLUX.1: image rows and text rows that do not divide by the ranks.

For such an image xDiT's wrapper calls a method that does not exist. Such a text stays whole on
every rank, beside the rank's part of the image, and each of its keys counts once a rank.

The wrapper here gets both padded to multiples of the ranks, which it cuts evenly, and the padding
is no key. Where xDiT's pipeline has cut the image itself, the text stays whole and each rank
brings its share of its keys. PipeFusion passes whole text as joint tensors, which count once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import forwards, rows
from swiftfusion_xdit.xdit.key_rows import share
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

WRAPPER = "xFuserFlux1Transformer2DWrapper"
PIPELINE_WRAPPER = "xFuserFluxTransformer2DWrapper"


def check(module: ModuleType) -> list[str]:
    whole = ("self", "hidden_states", "encoder_hidden_states", "args", "timestep", "img_ids")
    part = ("self", "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    return [
        *check_names(getattr(module, WRAPPER, None), "forward", (*whole, "txt_ids", "kwargs")),
        *check_names(
            getattr(module, PIPELINE_WRAPPER, None),
            "forward",
            (*part, "img_ids", "txt_ids", "guidance", "joint_attention_kwargs", "return_dict"),
        ),
    ]


def apply(module: ModuleType, patches: Patches) -> None:
    corrections.around(getattr(module, WRAPPER), "forward", patches, forward)
    corrections.around(getattr(module, PIPELINE_WRAPPER), "forward", patches, _forward_of_part)


def forward(
    session: Session,
    original: Any,
    self: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    *args: Any,
    img_ids: Any,
    txt_ids: Any,
    **kwargs: Any,
) -> Any:
    """Of a wrapper that gets whole sequences and cuts them; attention joins text and image."""
    num_image, num_text = hidden_states.shape[1], encoder_hidden_states.shape[1]
    with rows.padded_parts(session, num_text, num_image):
        output = original(
            self,
            rows.pad(hidden_states, session),
            rows.pad(encoder_hidden_states, session),
            *args,
            img_ids=rows.pad(img_ids, session),
            txt_ids=rows.pad(txt_ids, session),
            **kwargs,
        )
    return forwards.with_sample(output, output[0][:, :num_image])


def _forward_of_part(
    session: Session,
    original: Any,
    self: Any,
    hidden_states: Any,
    encoder_hidden_states: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    state = session.state
    if state.split_text_embed_in_sp or state.num_pipeline_patch > 1:
        return original(self, hidden_states, encoder_hidden_states, *args, **kwargs)
    num_text, num_image = encoder_hidden_states.shape[1], hidden_states.shape[1]
    kept = [share(num_text, session.rank, session.size), (num_text, num_text + num_image)]
    with session.only_keys(num_text + num_image, kept, total=[num_text]):
        return original(self, hidden_states, encoder_hidden_states, *args, **kwargs)
