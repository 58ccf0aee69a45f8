"""PipeFusion under torus: attention of one patch with the keys kept of all others.

xDiT's own PipeFusion does not run on CPU ranks, so these calls do what its pipelines do: one pass
over all rows, then patches in turn, in every form of xDiT's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool

TOLERANCE = 2e-6
PATCHES = (3, 5)  # rows of a rank in each
FORMS = ("naive_cache", "sequence_parallel_attn_cache")
JOINT = 4


def state_of_patches() -> Any:
    from xfuser.core.distributed import get_runtime_state

    state = get_runtime_state()
    state.num_pipeline_patch = len(PATCHES)
    state.pp_patches_token_num = list(PATCHES)
    state.pp_patches_token_start_idx_local = [0, PATCHES[0], sum(PATCHES)]
    return state


def layer_with_cache(form: str) -> Any:
    from xfuser.core.cache_manager.cache_manager import get_cache_manager

    layer = torch.nn.Module()
    get_cache_manager().register_cache_entry(layer, "attn", form)
    return layer


def rows_of_rank(ranks: int, num_rows: int, seed: int) -> list[list[Tensor]]:
    """q, k and v `[b, h, s, d]` of every rank."""
    return [
        [
            xdit_cases.noise(1, xdit_calls.H, num_rows, xdit_calls.D, seed=1000 * seed + 10 * r + i)
            for i in range(3)
        ]
        for r in range(ranks)
    ]


def passes(
    rank: int, world_size: int, strategy: str, form: str, joint_strategy: str | None, degrees: Any
) -> list[float]:
    with xdit_cases.xdit_groups():
        xdit_calls.start(strategy, **degrees)
        state, layer = state_of_patches(), layer_with_cache(form)
        joint = [xdit_cases.noise(1, xdit_calls.H, JOINT, xdit_calls.D, seed=s) for s in range(3)]
        if joint_strategy is None:
            joint = [x[:, :, :0] for x in joint]
        kept: list[list[Tensor]] = []
        errors = []
        for step, patch in enumerate([None, 0, 1, 0, 1]):
            state.patch_mode = patch is not None
            state.pipeline_patch_idx = patch or 0
            start = 0 if patch is None else sum(PATCHES[:patch])
            num_rows = sum(PATCHES) if patch is None else PATCHES[patch]
            rows = rows_of_rank(world_size, num_rows, step)
            if patch is None:
                kept = [[x.clone() for x in of_rank[1:]] for of_rank in rows]
            for mine, new in zip(kept, rows, strict=True):
                for x, part in zip(mine, new[1:], strict=True):
                    x[:, :, start : start + num_rows] = part
            errors.append(one(rows[rank], kept, joint, joint_strategy, layer))
        return errors


def one(
    mine: list[Tensor],
    kept: list[list[Tensor]],
    joint: list[Tensor],
    joint_strategy: str | None,
    layer: Any,
) -> float:
    q = mine[0]
    keys = torch.cat([*(of_rank[0] for of_rank in kept), joint[1]], dim=2)
    values = torch.cat([*(of_rank[1] for of_rank in kept), joint[2]], dim=2)
    more = {}
    if joint_strategy is not None:
        q = torch.cat([joint[0], q] if joint_strategy == "front" else [q, joint[0]], dim=2)
        names = ("joint_query", "joint_key", "joint_value")
        more = {**dict(zip(names, joint, strict=True)), "joint_strategy": joint_strategy}
    out = xdit_calls.usp_module().USP(*mine, attn_layer=layer, **more)
    return xdit_cases.relative_difference(out, xdit_calls.oracle(q, keys, values))


@pytest.mark.parametrize("joint_strategy", [None, "front", "rear"])
@pytest.mark.parametrize("form", FORMS)
def test_patches_meet_the_rows_kept_of_others(
    rank_pool: Callable[[int], RankPool], form: str, joint_strategy: str | None
) -> None:
    found = rank_pool(4).run(passes, "torus", form, joint_strategy, {}, timeout_s=120)
    for errors in found:
        assert max(errors) <= TOLERANCE, (form, joint_strategy, errors)


def under_usp(rank_pool: Callable[[int], RankPool], degrees: tuple[int, int]) -> list[float]:
    """The worst rank's error of every pass under xDiT's own cache."""
    arguments = {
        "ulysses_degree": degrees[0],
        "ring_degree": degrees[1],
        "sp_machines": "auto",
        "attention_backend": "SDPA_FLASH",
    }
    found = rank_pool(2).run(passes, "usp", FORMS[1], "rear", arguments, timeout_s=120)
    return [max(of_pass) for of_pass in zip(*found, strict=True)]


def test_as_under_xdits_own_cache(rank_pool: Callable[[int], RankPool]) -> None:
    """The oracle is what xDiT's cache for sequence parallelism gives too."""
    assert max(under_usp(rank_pool, (1, 2))) <= TOLERANCE


def test_fault_first_patches_under_ulysses(rank_pool: Callable[[int], RankPool]) -> None:
    """xDiT fills its cache rank by rank and updates it patch by patch: rows of other patches are
    lost and others count twice until every patch has come once after the full pass."""
    errors = under_usp(rank_pool, (2, 1))
    assert errors[1] > 1e-2
    assert max(errors[:1] + errors[2:]) <= TOLERANCE


def misused(rank: int, world_size: int) -> list[str]:
    messages = []
    with xdit_cases.xdit_groups():
        xdit_calls.start()
        state = state_of_patches()
        state.patch_mode, state.pipeline_patch_idx = True, 0
        layer = layer_with_cache(FORMS[1])
        mine = rows_of_rank(world_size, 3, 0)[rank]
        with pytest.raises(ValueError) as caught:
            xdit_calls.usp_module().USP(*mine, attn_layer=layer)
        messages.append(str(caught.value))
        state.patch_mode = False
        xdit_calls.usp_module().USP(*rows_of_rank(world_size, 8, 1)[rank], attn_layer=layer)
        state.patch_mode, state.pipeline_patch_idx = True, 1
        with pytest.raises(ValueError) as caught:
            xdit_calls.usp_module().USP(*mine, attn_layer=layer)
        messages.append(str(caught.value))
    return messages


def test_rows_that_are_no_patch(rank_pool: Callable[[int], RankPool]) -> None:
    for first, second in rank_pool(4).run(misused, timeout_s=60):
        assert "needs a full pass before it" in first
        assert "patch 1 has local rows 3 to 8 of 8, got 3 key rows" in second
