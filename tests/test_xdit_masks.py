"""Masks, varlen packing and valid lengths of USP calls, under torus, against an oracle in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool
from tests.test_xdit_kernels import meshes_in_use

TOLERANCE = 2e-6
ROWS = 32  # of the whole sequence
MESHES = (
    None,
    "torus=2,ulysses=1,ring=2",
    "torus=2,ulysses=2,ring=1",
    "torus=1,ulysses=4,ring=1",
    "torus=1,ulysses=1,ring=4",
)


def masked_oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`[b, h, s, d]` in fp64 under a boolean or added mask; 0 for queries that attend no key."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill_(~mask, -math.inf)
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + mask.double()
    return torch.nan_to_num(scores.softmax(dim=-1)) @ v


def bits(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def keys_of_samples() -> Tensor:
    """`[b, 1, 1, s]`: another part of the keys in each sample, of one rank none at all."""
    mask = bits(xdit_calls.B, 1, 1, ROWS, seed=1)
    mask[0, ..., 8:16] = False
    return mask


def dense_with_an_empty_row() -> Tensor:
    mask = bits(xdit_calls.B, 1, ROWS, ROWS, seed=2)
    mask[:, :, 3] = False
    return mask


def valid(num_rows: int) -> Tensor:
    return (torch.arange(ROWS) < num_rows)[None, None, None]


def packed(mask: Tensor) -> dict[str, Any]:
    """A mask of keys `[b, 1, 1, s]` as varlen packing says it."""
    lengths = mask.flatten(1).sum(dim=1)
    return {
        "indices_k": mask.flatten().nonzero().flatten(),
        "cu_seqlens_k": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_seqlen_k": int(lengths.max()),
    }


# attention_kwargs, and the mask that they stand for.
CASES: dict[str, Callable[[], tuple[dict[str, Any], Tensor]]] = {
    "keys, alike in all samples": lambda: both(keys_of_samples()[1:]),
    "keys, by sample": lambda: both(keys_of_samples()),
    "dense, boolean": lambda: both(bits(xdit_calls.B, 1, ROWS, ROWS, seed=2)),
    "dense, a query without keys": lambda: both(dense_with_an_empty_row()),
    "dense, one for all samples": lambda: both(bits(1, 1, ROWS, ROWS, seed=3)),
    "added": lambda: both(xdit_cases.noise(1, 1, ROWS, ROWS, seed=4)),
    "added, of keys": lambda: both(xdit_cases.noise(xdit_calls.B, 1, 1, ROWS, seed=5)),
    "varlen": lambda: (packed(keys_of_samples()), keys_of_samples()),
    "varlen and its mask": lambda: (
        {"attn_mask": keys_of_samples(), **packed(keys_of_samples())},
        keys_of_samples(),
    ),
    "valid length": lambda: ({"valid_kv_len": 21}, valid(21)),
    "valid length of one row": lambda: ({"valid_kv_len": 1}, valid(1)),
    "valid length of all": lambda: ({"valid_kv_len": ROWS}, valid(ROWS)),
    "indices say more than the valid length": lambda: (
        {"valid_kv_len": 30, **packed(keys_of_samples())},
        keys_of_samples(),
    ),
}


# Those whose masks differ between queries, or are added: no mesh with a ring serves them.
WHOLE = frozenset(case for case in CASES if case.startswith(("dense", "added")))


def both(mask: Tensor) -> tuple[dict[str, Any], Tensor]:
    return {"attn_mask": mask}, mask


def error(rank: int, case: str, kv_heads: int, *, size: int = 4) -> float:
    """Of one call on ``size`` ranks."""
    chunk = ROWS // size
    kwargs, mask = CASES[case]()
    q, k, v = (
        xdit_cases.noise(xdit_calls.B, heads, ROWS, xdit_calls.D, seed=seed)
        for seed, heads in enumerate((xdit_calls.H, kv_heads, kv_heads))
    )
    mine = slice(rank * chunk, (rank + 1) * chunk)
    out = xdit_calls.usp_module().USP(
        q[:, :, mine],
        k[:, :, mine],
        v[:, :, mine],
        attention_kwargs=kwargs,
        kv_head_repeat=xdit_calls.H // kv_heads,
    )
    expected = masked_oracle(q, k, v, mask)[:, :, mine]
    return xdit_cases.relative_difference(out, expected)


def errors(rank: int, world_size: int, mesh: str | None) -> dict[tuple[str, int], float]:
    has_ring = mesh is not None and not mesh.endswith("ring=1")
    found = {}
    with xdit_cases.xdit_groups():
        xdit_calls.start(sp_mesh=mesh)
        for case in CASES:
            for kv_heads in (xdit_calls.H, 3):
                if has_ring and case in WHOLE:
                    with pytest.raises(NotImplementedError, match=r"--sp-mesh .* needs ring=1"):
                        error(rank, case, kv_heads)
                else:
                    found[case, kv_heads] = error(rank, case, kv_heads)
        if mesh is not None:
            assert meshes_in_use() == {mesh}
    assert len(found) == 2 * len(CASES) - 2 * len(WHOLE) * has_ring
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_agrees_with_the_oracle(rank_pool: Callable[[int], RankPool], mesh: str | None) -> None:
    results = rank_pool(4).run(errors, mesh, timeout_s=120)
    for case in results[0]:
        values = [result[case] for result in results]
        assert max(values) <= TOLERANCE, (mesh, case, values)


def compiled(rank: int, world_size: int) -> tuple[float, int]:
    mask, size = dense_with_an_empty_row(), ROWS // 4

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        usp = xdit_calls.usp_module()
        return usp.USP(q * 2, k, v, attention_kwargs={"attn_mask": mask}) + 1

    with xdit_cases.xdit_groups(), torch.no_grad():
        xdit_calls.start()
        mine = [xdit_cases.noise(2, 6, size, 16, seed=10 * rank + i) for i in range(3)]
        expected = layer(*mine)
        breaks = torch._dynamo.explain(layer)(*mine).graph_break_count
        out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*mine)
        torch._dynamo.reset()
    return xdit_cases.relative_difference(out, expected), breaks


def test_compiles_without_a_graph_break(rank_pool: Callable[[int], RankPool]) -> None:
    for difference, breaks in rank_pool(4).run(compiled, timeout_s=180):
        assert breaks == 0
        assert difference <= TOLERANCE


BAD = {
    "valid_kv_len must be in [1, 8 rows * 4 ranks = 32], got 33": {"valid_kv_len": 33},
    "valid_kv_len must be in [1, 8 rows * 4 ranks = 32], got 0": {"valid_kv_len": 0},
    "attn_mask must cover the keys of all ranks, 8 rows * 4 ranks = 32": {
        "attn_mask": torch.ones(1, 1, 1, 8, dtype=torch.bool)
    },
}


def bad_masks(rank: int, world_size: int) -> dict[str, str]:
    found = {}
    with xdit_cases.xdit_groups():
        xdit_calls.start()
        for name, kwargs in BAD.items():
            with pytest.raises(ValueError) as caught:
                xdit_calls.call(rank, attention_kwargs=kwargs)
            found[name] = str(caught.value)
        # The layer after an error is whole again.
        assert xdit_calls.call(rank) <= TOLERANCE
    return found


def test_bad_masks_name_rule_and_values(rank_pool: Callable[[int], RankPool]) -> None:
    for found in rank_pool(4).run(bad_masks, timeout_s=120):
        for expected, message in found.items():
            assert expected in message


def rewritten(rank: int, world_size: int) -> list[float]:
    """A mask that is written to in place is read again; so is another at the same address."""
    size = ROWS // 4
    q = xdit_cases.noise(1, xdit_calls.H, ROWS, xdit_calls.D)
    mine = q[:, :, rank * size : (rank + 1) * size]
    mask = torch.ones(1, 1, 1, ROWS, dtype=torch.bool)
    found = []
    with xdit_cases.xdit_groups():
        xdit_calls.start()
        for masked in (0, 3, 17, 31):
            mask[..., masked] = False
            for _ in range(2):
                kwargs = {"attn_mask": mask}
                out = xdit_calls.usp_module().USP(mine, mine, mine, attention_kwargs=kwargs)
                expected = masked_oracle(mine, q, q, mask)
                found.append(xdit_cases.relative_difference(out, expected))
    return found


def test_a_mask_that_changes_in_place(rank_pool: Callable[[int], RankPool]) -> None:
    for values in rank_pool(4).run(rewritten, timeout_s=120):
        assert max(values) <= TOLERANCE, values
