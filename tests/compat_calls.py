"""What torus makes of every argument of USP: exact, through xDiT, refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests import test_xdit_kernels as kernels
from tests import test_xdit_masks as masks
from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool

TOLERANCE = 1e-5
Call = Callable[[int, int], float]


def plain(**case: Any) -> Call:
    """A call of equal chunks on any number of ranks, unless the case names their rows."""
    return lambda rank, size: xdit_calls.call(rank, **{"s_q": (8,) * size, **case})


def masked(case: str) -> Call:
    return lambda rank, size: masks.error(rank, case, xdit_calls.H, size=size)


def kernel(case: str) -> Call:
    return lambda rank, size: kernels.one(rank, size, *kernels.CASES[case])


def with_mask_a_head(rank: int, size: int) -> float:
    rows = 8 * size
    mask = torch.ones(xdit_calls.B, xdit_calls.H, rows, rows, dtype=torch.bool)
    return plain(attention_kwargs={"attn_mask": mask})(rank, size)


def causal(rank: int, size: int) -> float:
    rows, mine = 8 * size, slice(8 * rank, 8 * rank + 8)
    q = xdit_cases.noise(1, xdit_calls.H, rows, xdit_calls.D)
    part = q[:, :, mine]
    out = xdit_calls.usp_module().USP(part, part, part, is_causal=True)
    expected = masks.masked_oracle(q, q, q, torch.ones(rows, rows, dtype=torch.bool).tril())
    return xdit_cases.relative_difference(out, expected[:, :, mine])


def padded_with_joint(rank: int, size: int) -> float:
    """The last rows of the last rank are padding; the text is not."""
    rows, valid, h, d = 8 * size, 8 * size - 3, xdit_calls.H, xdit_calls.D
    q, k, v = (xdit_cases.noise(1, h, rows, d, seed=seed) for seed in range(3))
    text = xdit_cases.noise(1, h, 5, d, seed=9)
    mine = slice(8 * rank, 8 * rank + 8)
    out = xdit_calls.usp_module().USP(
        *(x[:, :, mine] for x in (q, k, v)),
        **dict.fromkeys(("joint_query", "joint_key", "joint_value"), text),
        joint_strategy="rear",
        attention_kwargs={"valid_kv_len": valid},
    )
    keys, values = (torch.cat([x[:, :, :valid], text], dim=2) for x in (k, v))
    expected = xdit_calls.oracle(torch.cat([q[:, :, mine], text], dim=2), keys, values)
    return xdit_cases.relative_difference(out, expected)


def mask_with_joint(rank: int, size: int) -> float:
    mask = torch.ones(1, 1, 1, 8 * size, dtype=torch.bool)
    return plain(**JOINT, attention_kwargs={"attn_mask": mask})(rank, size)


def sparse_with_joint(rank: int, size: int) -> float:
    sparse = kernels.backends().AttentionBackendType["AITER_SPARGE"]
    return plain(joint=4, joint_strategy="rear", backend=sparse)(rank, size)


JOINT = {"joint": 5, "joint_strategy": "rear"}
GQA = {"kv_heads": 3, "kv_head_repeat": 2}
ROWS: dict[str, Call] = {
    "joint text, `joint_strategy=front`": plain(**{**JOINT, "joint_strategy": "front"}),
    "joint text, `joint_strategy=rear`": plain(**JOINT),
    "grouped-query attention, `kv_head_repeat`": plain(**GQA),
    "the same, key heads not divisible by the ranks": plain(kv_heads=2, kv_head_repeat=3),
    "the same, with joint text": plain(**GQA, **JOINT),
    "chunks of unequal length": lambda rank, size: plain(s_q=(9, 4, 2, 1)[:size])(rank, size),
    "fewer keys than queries": lambda rank, size: plain(s_kv=(3,) * size)(rank, size),
    "boolean `attn_mask` of keys": masked("keys, by sample"),
    "boolean `attn_mask` of queries and keys": masked("dense, boolean"),
    "`attn_mask` that is added": masked("added"),
    "`attn_mask` that differs between heads": with_mask_a_head,
    "`indices_k`, `cu_seqlens_k`, `max_seqlen_k`": masked("varlen"),
    "`valid_kv_len`": masked("valid length"),
    "`valid_kv_len` with joint text": padded_with_joint,
    "`attn_mask`, `indices_k` with joint text": mask_with_joint,
    "`attn_layer`, `combine_qkv_a2a`": plain(attn_layer=object(), combine_qkv_a2a=True),
    "quantised backend (SageAttention, fp8)": kernel("quantised"),
    "sparse backend (Sparge, VSA, SSTA)": kernel("sparse, with arguments"),
    "sparse backend with head balance": kernel("sparse, head balance"),
    "sparse backend with joint text": sparse_with_joint,
    "`ulysses_extra_inputs`": kernel("extra inputs"),
    "`is_causal=True`": causal,
    "an unknown entry of `attention_kwargs`": plain(attention_kwargs={"never_heard_of": 1}),
}


@contextlib.contextmanager
def stand_in_kernels() -> Iterator[None]:
    """Functions in the places of xDiT's GPU kernels; see tests.test_xdit_kernels."""
    backends = kernels.backends()
    registry = backends.ATTENTION_FUNCTION_REGISTRY
    known = dict(registry)
    types = backends.AttentionBackendType
    registry.update({types[name]: function for name, function in kernels.FUNCTIONS.items()})
    try:
        yield
    finally:
        registry.clear()
        registry.update(known)


def attempts(rank: int, world_size: int, titles: list[str], arguments: Any) -> dict[str, Any]:
    """The error of every call, or what it raised."""
    found: dict[str, Any] = {}
    with stand_in_kernels(), xdit_cases.xdit_groups():
        xdit_calls.start(**arguments)
        for title in titles:
            try:
                found[title] = ROWS[title](rank, world_size)
            except Exception as error:  # what is raised is what is asked for
                found[title] = f"{type(error).__name__}: {error}"
    return found


def outcomes(pools: Callable[[int], RankPool]) -> dict[str, str]:
    """A word for every row. What torus refuses is tried again with ``--sp-fallback usp``."""
    first = pools(4).run(attempts, list(ROWS), {}, timeout_s=180)
    words, refused = {}, []
    for title in ROWS:
        values = [of_rank[title] for of_rank in first]
        if all(isinstance(value, float) for value in values):
            words[title] = "exact" if max(values) <= TOLERANCE else "wrong"
        else:
            is_refused = all(str(value).startswith("NotImplementedError") for value in values)
            words[title] = "refused" if is_refused else f"fails: {values}"
            refused.append(title)
    # Two ranks of one Ulysses group: where stock USP serves the most.
    arguments = {"ring_degree": 1, "sp_machines": "auto", "sp_fallback": "usp"}
    second = pools(2).run(attempts, refused, arguments, timeout_s=180)
    for title in refused:
        values = [of_rank[title] for of_rank in second]
        if all(isinstance(value, float) and value <= TOLERANCE for value in values):
            words[title] = "through xDiT"
    return words


def table(words: dict[str, str]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| argument of `USP` | torus |", "|---|---|"]
    return lines + [f"| {title} | {word} |" for title, word in words.items()]
