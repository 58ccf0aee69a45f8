"""xDiT's attention classes that are not USP, on CPU ranks, where xDiT leaves them empty.

StepVideo uses ``xFuserLongContextAttention``, Sana ``xFuserSanaLinearLongContextAttention``, both
over yunchang's Ulysses and Ring groups.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

PACKAGE = "xfuser.core.long_ctx_attention"


@contextlib.contextmanager
def real_classes() -> Iterator[Any]:
    """Inside, xDiT's package of these classes is as on GPUs, but for the kernel it calls."""
    import xfuser.core
    import yunchang.kernels.attention as kernels
    from xfuser.model_executor.layers import attention_processor

    kept = {name: module for name, module in sys.modules.items() if name.startswith(PACKAGE)}
    for name in kept:
        del sys.modules[name]
    try:
        with contextlib.ExitStack() as shown:
            # xDiT imports it for NPUs, and yunchang has it only where there is one.
            shown.enter_context(mock.patch("yunchang.ring.utils.update_npu_out", None, create=True))
            with mock.patch("torch.cuda.is_available", return_value=True):
                package = importlib.import_module(PACKAGE)
                importlib.import_module(f"{PACKAGE}.ring")
            name = "_scaled_dot_product_flash_attention"
            shown.enter_context(mock.patch.object(kernels, name, _flash_attention))
            # Without flash-attn xDiT asks yunchang for a kind of attention that it does not have.
            shown.enter_context(mock.patch.object(attention_processor, "HAS_FLASH_ATTN", True))
            yield package
    finally:
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            del sys.modules[name]
        sys.modules.update(kept)
        xfuser.core.long_ctx_attention = kept[PACKAGE]


def _flash_attention(*args: Any, **kwargs: Any) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)
