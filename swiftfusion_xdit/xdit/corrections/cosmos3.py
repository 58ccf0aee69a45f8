"""Cosmos3: keys of the text, padding of what is generated.

xDiT keeps the rows of the understanding pathway whole on every rank and puts their keys before
those of the rank's part of the generation pathway, so each counts once a rank. Its zero rows at
the end of the generation pathway are unmasked keys. Here each rank brings its share of the
former, and the latter are no keys.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from swiftfusion_xdit.xdit import corrections
from swiftfusion_xdit.xdit.compat import check_names
from swiftfusion_xdit.xdit.corrections import forwards
from swiftfusion_xdit.xdit.key_rows import share, valid_rows
from swiftfusion_xdit.xdit.patches import Patches
from swiftfusion_xdit.xdit.session import Session

MAKE = "_make_xfuser_cosmos3_transformer_wrapper"
MADE = "_wrapper_cls"


def check(module: ModuleType) -> list[str]:
    processor = getattr(module, "xFuserCosmos3AttnProcessor", None)
    problems = check_names(
        processor, "__call__", ("self", "attn", "und_seq", "gen_seq", "rotary_emb")
    )
    return [*problems, *check_names(module, MAKE, ())]


def apply(module: ModuleType, patches: Patches) -> None:
    """xDiT makes the class on first use."""
    make = getattr(module, MAKE)

    @functools.wraps(make)
    def make_corrected() -> Any:
        wrapper = make()
        corrections.around(wrapper, "forward", patches, _forward)
        return wrapper

    patches.set(module, MAKE, make_corrected)
    made = getattr(module, MADE, None)
    if made is not None:
        corrections.around(made, "forward", patches, _forward)


def _forward(session: Session, original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = forwards.bind(original, self, *args, **kwargs)
    num_und = arguments["und_len"]
    num_gen = arguments["sequence_length"] - num_und
    chunk_rows = -(-num_gen // session.size)
    start, stop = valid_rows(num_gen, session.rank, chunk_rows)
    und = share(num_und, session.rank, session.size)
    kept = [und, (num_und + start, num_und + stop)]
    with session.only_keys(num_und + chunk_rows, kept, total=[num_und, num_gen]):
        return original(self, **arguments)
