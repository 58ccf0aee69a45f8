"""Bad input is refused with the argument, the rule and the values; the group stays usable."""

from __future__ import annotations

import pytest
import torch

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.sequence_parallel import SequenceParallel
from tests.sp_cases import Case

CONSTRUCTOR = [
    ({"strategy": "spiral"}, "strategy must be one of usp, tas, torus; got 'spiral'"),
    ({"schedule": "fast"}, "schedule must be one of auto, torus, folded, pipelined, fused; got"),
    ({"schedule": "folded", "groups": 2}, "groups must be at least 1, with schedule='torus', 'pip"),
    ({"schedule": "fused", "groups": 0}, "groups must be at least 1, .* got groups=0"),
    ({"strategy": "usp", "schedule": "torus"}, "schedule='torus' needs strategy='torus'"),
    ({"transport": "pigeon"}, "transport must be one of auto, shm, .* got 'pigeon'"),
    ({"backend": "abacus"}, "backend must be one of .* got 'abacus'"),
    ({"machines": 3}, "machines must divide the ranks: 2 ranks / 3 machines"),
    ({"mesh": "torus=2,ring=2"}, r"torus\(2\) \* ulysses\(1\) \* ring\(2\) = 4 != sp group size 2"),
    ({"mesh": "torus=x"}, "mesh must look like .* got 'torus=x'"),
]


def construct(rank: int, world_size: int, options: dict) -> str:
    try:
        SequenceParallel(**options)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("options", "message"), CONSTRUCTOR)
def test_constructor(rank_pool, options: dict, message: str) -> None:
    for said in rank_pool(2).run(construct, options):
        assert pytest.raises(ValueError, match=message).matches(ValueError(said)), said


def differing_options(rank: int, world_size: int, option: str, values: tuple) -> str:
    return construct(rank, world_size, {option: values[rank]})


@pytest.mark.parametrize(
    ("option", "values"), [("schedule", ("torus", "pipelined")), ("tune", (False, True))]
)
def test_options_differ_between_ranks(rank_pool, option: str, values: tuple) -> None:
    for said in rank_pool(2).run(differing_options, option, values):
        assert "options must be the same on every rank: ranks [1] differ from rank 0" in said


def tensors(**changes: object) -> dict[str, torch.Tensor]:
    """q, k, v [1, 4, 4, 8], with some replaced by others of the given shape, dtype or device."""
    made = {name: torch.randn(1, 4, 4, 8) for name in "qkv"}
    for name, change in changes.items():
        if isinstance(change, torch.dtype | torch.device):
            made[name] = made[name].to(change)
        else:
            made[name] = torch.randn(change)
    return made


ATTENTION = [
    ({"q": (4, 4, 8)}, r"q must be \[B, s_q, H, D\].* got q \(4, 4, 8\)"),
    ({"v": (1, 5, 4, 8)}, r"k \(1, 4, 4, 8\), v \(1, 5, 4, 8\)"),
    ({"q": (2, 4, 4, 8)}, r"same batch and head dim; got q \(2, 4, 4, 8\)"),
    ({"q": (1, 4, 4, 16)}, r"same batch and head dim; got q \(1, 4, 4, 16\)"),
    ({"q": (1, 4, 6, 8)}, r"H must be a positive multiple of H_kv.* got q \(1, 4, 6, 8\)"),
    ({"q": torch.bfloat16}, r"one dtype of .* got torch.bfloat16, torch.float32, torch.float32"),
    (dict.fromkeys("qkv", torch.int32), r"one dtype of .* got torch.int32"),
    ({"k": torch.device("meta")}, r"on this group's device cpu; got cpu, meta, cpu"),
]


def attend_then_recover(rank: int, world_size: int, changes: dict) -> tuple[str, float]:
    """The error of a bad call, on one rank only, and then how exact the next call is."""
    case = Case(Mesh(2), (4, 5), (4, 5), machines=2)
    with case.open() as sp:
        said = "not called"
        if rank == 1:
            try:
                sp.attention(**tensors(**changes))
                said = "accepted"
            except ValueError as error:
                said = str(error)
        return said, case.error(sp, rank)


@pytest.mark.parametrize(("changes", "message"), ATTENTION)
def test_attention(rank_pool, changes: dict, message: str) -> None:
    (_, first), (said, second) = rank_pool(2).run(attend_then_recover, changes)
    assert pytest.raises(ValueError, match=message).matches(ValueError(said)), said
    assert max(first, second) <= 2e-6


def differ_between_ranks(rank: int, world_size: int, bad: dict) -> tuple[str, float]:
    case = Case(Mesh(2), (4, 5), (4, 5), machines=2)
    with case.open() as sp:
        try:
            sp.attention(**(tensors(**bad) if rank == 1 else tensors()))
            said = "accepted"
        except ValueError as error:
            said = str(error)
        return said, case.error(sp, rank)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 4, 8), r"batch must be the same on every rank, got \[1, 2\] by rank"),
        ((1, 4, 8, 8), r"H must be the same on every rank, got \[4, 8\] by rank"),
        ((1, 4, 4, 4), r"D must be the same on every rank, got \[8, 4\] by rank"),
        (torch.float16, r"dtype must be the same .* \[torch.float32, torch.float16\] by rank"),
    ],
)
def test_ranks_differ(rank_pool, shape: object, message: str) -> None:
    for said, error in rank_pool(2).run(differ_between_ranks, dict.fromkeys("qkv", shape)):
        assert pytest.raises(ValueError, match=message).matches(ValueError(said)), said
        assert error <= 2e-6


def too_few_heads(rank: int, world_size: int) -> str:
    with SequenceParallel(mesh="torus=2") as sp:
        q = torch.randn(1, 4, 1, 8)
        try:
            sp.attention(q, q, q)
        except ValueError as error:
            return str(error)
    return "accepted"


def test_more_head_groups_than_heads(rank_pool) -> None:
    for said in rank_pool(2).run(too_few_heads):
        assert "torus(2) * ulysses(1) = 2 head groups need at least as many heads" in said


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="group must be a process group"):
        SequenceParallel()


def gradient(rank: int, world_size: int) -> str:
    with SequenceParallel() as sp:
        q = torch.randn(1, 4, 2, 8, requires_grad=True)
        out = sp.attention(q, q, q)
        try:
            out.sum().backward()
        except NotImplementedError as error:
            return str(error)
    return "accepted"


def test_gradient_is_refused(rank_pool) -> None:
    for said in rank_pool(2).run(gradient):
        assert said == "sequence-parallel attention has no backward pass"


def use_after_close(rank: int, world_size: int) -> str:
    with SequenceParallel() as sp:
        pass
    q = torch.randn(1, 4, 2, 8)
    try:
        sp.attention(q, q, q)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def test_use_after_close(rank_pool) -> None:
    for said in rank_pool(2).run(use_after_close):
        assert "is closed" in said, said
