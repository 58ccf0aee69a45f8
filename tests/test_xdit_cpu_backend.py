"""Without a GPU xDiT takes an attention backend that runs, also where torch is built for CUDA."""

from __future__ import annotations

import pytest
import torch

from tests import xdit_calls, xdit_cases


def chosen(rank: int, world_size: int, ring: int, named: str | None) -> str:
    from xfuser.core.distributed import get_runtime_state

    with pytest.MonkeyPatch.context() as patch, xdit_cases.xdit_groups():
        # What a CUDA build says on a machine without a GPU.
        patch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        degrees = {"ulysses_degree": world_size // ring, "ring_degree": ring}
        xdit_calls.start("usp", **degrees, attention_backend=named)
        return get_runtime_state().attention_backend.name


@pytest.mark.parametrize(
    ("ring", "named", "expected"),
    [(1, None, "SDPA"), (2, None, "SDPA_FLASH"), (1, "SDPA_MATH", "SDPA_MATH")],
)
def test_backend(ring: int, named: str | None, expected: str, rank_pool) -> None:
    assert rank_pool(2).run(chosen, ring, named) == [expected] * 2
