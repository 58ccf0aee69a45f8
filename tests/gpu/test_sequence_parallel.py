"""Attention over GPUs of one machine: exact, and the same bits from a replayed graph."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from swiftfusion_xdit.attention.reference import relative_error
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.sequence_parallel import SequenceParallel
from tests.gpu.ranks import RANKS, run_on_gpus
from tests.meshes import meshes_of
from tests.sp_cases import uneven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SCHEDULES = ("torus", "folded", "pipelined", "fused")


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fp32 attention of bf16 inputs, [B, S, H, D]."""
    shared_by = q.shape[2] // k.shape[2]
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(shared_by, dim=1) for x in (k, v))
    weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def inputs(rank: int, seed: int, lengths: list[tuple[int, ...]], heads: tuple[int, int]) -> Any:
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = [(lengths[0], heads[0]), (lengths[1], heads[1]), (lengths[1], heads[1])]
    whole = [
        torch.randn(2, sum(rows), h, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
        for rows, h in sizes
    ]
    expected = reference(*whole).split(lengths[0], dim=1)[rank]
    mine = [
        x.split(rows, dim=1)[rank].contiguous() for x, (rows, _) in zip(whole, sizes, strict=True)
    ]
    return mine, expected


def attend(rank: int, num_ranks: int, backend: str) -> list[tuple[str, float]]:
    errors = []
    start_s = time.monotonic()
    for mesh in meshes_of(num_ranks):
        for schedule in SCHEDULES:
            if rank == 0:  # kernels may have to be compiled first, which takes minutes
                print(f"{mesh} {schedule} after {time.monotonic() - start_s:.1f} s", flush=True)
            with SequenceParallel(
                mesh=mesh, schedule=schedule, backend=backend, device="cuda"
            ) as sp:
                worst = 0.0
                for layer in range(6):
                    rows = 300 + 64 * (layer // 3)
                    totals = num_ranks * rows + 1, num_ranks * rows + 33
                    lengths = [uneven(total, num_ranks) for total in totals]
                    # 2, then 3 query heads a key head, which tiles of 128 rows hold whole, and not.
                    kv_heads = 4 if layer // 3 else 6
                    mine, expected = inputs(rank, layer, lengths, (12, kv_heads))
                    worst = max(worst, relative_error(sp.attention(*mine).cpu(), expected.cpu()))
                errors.append((f"{mesh} {schedule}", worst))
    return errors


def need(backend: str) -> str:
    if backend == "fa4":
        pytest.importorskip("flash_attn.cute.interface", reason="needs flash-attn-4")
    return backend


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("backend", ["cudnn", "sdpa_flash", "fa4"])
def test_exact(backend: str, num_ranks: int) -> None:
    need(backend)
    for errors in run_on_gpus(num_ranks, attend, backend):
        assert all(error <= 1e-2 for _, error in errors), errors


def replay(rank: int, num_ranks: int, schedule: str, backend: str, turns: int = 300) -> str:
    """Two layers captured, replayed with fresh inputs between eager layers."""
    lengths = [uneven(500 * num_ranks + 1, num_ranks)] * 2
    mesh = Mesh(ring=num_ranks) if schedule == "fused" else Mesh(torus=2, ring=num_ranks // 2)
    with SequenceParallel(mesh=mesh, schedule=schedule, backend=backend, device="cuda") as sp:
        cases = [inputs(rank, seed, lengths, (8, 8))[0] for seed in range(4)]
        expected = [sp.attention(*case).clone() for case in cases]
        a, b = ([x.clone() for x in cases[0]] for _ in range(2))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            sp.attention(*a)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_a = sp.attention(*a)
            out_b = sp.attention(*b)
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")  # the host runs ahead meanwhile
        for turn in range(turns):
            first, second = turn % 4, (turn * 3 + 1) % 4
            for source, target in ((first, a), (second, b)):
                for x, y in zip(cases[source], target, strict=True):
                    y.copy_(x)
            graph.replay()
            for out, case in ((out_a, first), (out_b, second)):
                wrong += (out != expected[case]).any()
            if turn % 50 == 49:
                if wrong.item():
                    return f"{wrong.item()} layers up to replay {turn} differ"
                if not torch.equal(sp.attention(*cases[2]), expected[2]):
                    return f"eager layer after replay {turn} differs"
    return "same bits"


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", ["sdpa_flash", "fa4"])
def test_graph_replays_give_the_same_bits(schedule: str, backend: str, num_ranks: int) -> None:
    found = run_on_gpus(num_ranks, replay, schedule, need(backend))
    assert found == ["same bits"] * num_ranks


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("schedule", ["fused", "auto"])
def test_ten_thousand_replays(schedule: str, num_ranks: int) -> None:
    found = run_on_gpus(num_ranks, replay, schedule, need("fa4"), 10_000)
    assert found == ["same bits"] * num_ranks


def come_again(rank: int, num_ranks: int, schedule: str, turns: int) -> str:
    """Eager layers at the same addresses, with and without graphs of their own."""
    lengths = [uneven(500 * num_ranks + 1, num_ranks)] * 2
    mesh = Mesh(ring=num_ranks) if schedule == "fused" else Mesh(torus=2, ring=num_ranks // 2)
    with SequenceParallel(
        mesh=mesh, schedule=schedule, backend="fa4", layer_graphs=True, device="cuda"
    ) as sp:
        cases = [inputs(rank, seed, lengths, (8, 8))[0] for seed in range(3)]
        places = [[x.clone() for x in case] for case in cases]
        expected = [sp.attention(*case).clone() for case in cases]
        for turn in range(turns):
            for number, place in enumerate(places):
                case = (turn * (number + 1)) % 3
                for x, y in zip(place, cases[case], strict=True):
                    x.copy_(y)
                if not torch.equal(sp.attention(*place), expected[case]):
                    return f"turn {turn} differs"
        (runner,) = sp._runners.values()
        graphs = runner._graphs._graphs  # type: ignore[attr-defined]
        return "same bits" if graphs else "no layer was captured"


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_layers_that_come_again_give_the_same_bits(schedule: str, num_ranks: int) -> None:
    need("fa4")
    assert run_on_gpus(num_ranks, come_again, schedule, 200) == ["same bits"] * num_ranks


def planned(rank: int, num_ranks: int, tune: bool) -> tuple[float, str]:
    """Mesh and schedule left to the planner, which measures the machine first."""
    lengths = [uneven(1301, num_ranks)] * 2
    with SequenceParallel(backend="sdpa_flash", tune=tune, device="cuda") as sp:
        worst = 0.0
        for layer in range(4):
            mine, expected = inputs(rank, layer, lengths, (6, 6))
            worst = max(worst, relative_error(sp.attention(*mine).cpu(), expected.cpu()))
        return worst, sp.describe()


@pytest.mark.parametrize("tune", [False, True])
def test_the_planner_decides_alike_on_all_ranks(tune: bool) -> None:
    found = run_on_gpus(RANKS[-1], planned, tune)
    assert max(error for error, _ in found) <= 1e-2
    assert len({described for _, described in found}) == 1
