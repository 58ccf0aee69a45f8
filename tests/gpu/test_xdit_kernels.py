"""Calls of xDiT's USP under torus on two GPUs: masks, lengths, GQA, joint text, xDiT's kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import test_xdit_masks as masks
from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool
from tests.gpu.ranks import run_on_gpus

pytest.importorskip("xfuser")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
HEAD_DIM, TEXT = 64, 5
TOLERANCE = {"cpu": 2e-6, "cuda": 1e-2}
SAGE_TOLERANCE = 5e-2  # 8-bit keys
BACKENDS = ("SDPA", "SDPA_MATH", "SDPA_EFFICIENT", "SDPA_FLASH")


def rows(seed: int, heads: int, num_rows: int, device: str) -> Tensor:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = xdit_cases.noise(xdit_calls.B, heads, num_rows, HEAD_DIM, seed=seed)
    return x.to(device, dtype)


def error(rank: int, size: int, device: str, case: str, kv_heads: int, **more: Any) -> float:
    """Of one call; ``case`` names a mask, or is empty; ``joint`` adds text."""
    total = masks.ROWS
    mine = slice(rank * total // size, (rank + 1) * total // size)
    joint = more.pop("joint", None)
    q, k, v = (rows(i, h, total, device) for i, h in enumerate((xdit_calls.H, kv_heads, kv_heads)))
    kwargs, mask = masks.CASES[case]() if case else ({}, masks.valid(total))
    if mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
        kwargs = {"attn_mask": mask}
    kwargs = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in kwargs.items()}
    queries, keys, values = q[:, :, mine], k, v
    if joint:
        text = [rows(7 + i, h, TEXT, device) for i, h in enumerate((q.shape[1], *[kv_heads] * 2))]
        more |= dict(zip(("joint_query", "joint_key", "joint_value"), text, strict=True))
        more["joint_strategy"] = joint
        order = slice(None, None, 1 if joint == "rear" else -1)
        queries = torch.cat([queries, text[0]][order], dim=2)
        keys, values = torch.cat([k, text[1]], dim=2), torch.cat([v, text[2]], dim=2)
        mask = torch.ones(1, 1, 1, total + TEXT, dtype=torch.bool)
    out = xdit_calls.usp_module().USP(
        *(x[:, :, mine] for x in (q, k, v)),
        attention_kwargs=kwargs or None,
        kv_head_repeat=xdit_calls.H // kv_heads,
        **more,
    )
    if mask.shape[2] > 1:
        mask = mask[:, :, mine]
    expected = masks.masked_oracle(*(x.float().cpu() for x in (queries, keys, values)), mask)
    return xdit_cases.relative_difference(out.float().cpu(), expected)


def errors(rank: int, size: int, device: str, names: tuple[str, ...]) -> dict[str, float]:
    import xfuser.core.distributed.attention_backend as attention_backend

    types = attention_backend.AttentionBackendType
    with xdit_cases.xdit_groups(), torch.no_grad():
        xdit_calls.start(ulysses_degree=size, ring_degree=1, sp_machines="auto")
        found = {}
        for kv_heads in (xdit_calls.H, 3):
            for case in ("", *masks.CASES):
                found[f"{case} {kv_heads}"] = error(rank, size, device, case, kv_heads)
            for joint in ("front", "rear"):
                found[f"{joint} {kv_heads}"] = error(rank, size, device, "", kv_heads, joint=joint)
        for name in names:
            found[name] = error(rank, size, device, "", xdit_calls.H, backend=types[name])
        return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="xDiT's ranks take GPUs where there are any")
def test_the_reference_on_cpu_ranks(rank_pool: Callable[[int], RankPool]) -> None:
    for found in rank_pool(2).run(errors, "cpu", BACKENDS, timeout_s=60):
        assert len(found) == 2 * (len(masks.CASES) + 3) + len(BACKENDS)
        assert max(found.values()) <= TOLERANCE["cpu"], found


@pytest.mark.gpu
@needs_gpus
def test_on_two_gpus() -> None:
    for found in run_on_gpus(2, errors, "cuda", BACKENDS):
        assert max(found.values()) <= TOLERANCE["cuda"], found


@pytest.mark.gpu
@needs_gpus
@pytest.mark.skipif(importlib.util.find_spec("sageattention") is None, reason="needs SAGE")
def test_sage_on_two_gpus() -> None:
    for found in run_on_gpus(2, errors, "cuda", ("SAGE",)):
        assert found["SAGE"] <= SAGE_TOLERANCE, found
