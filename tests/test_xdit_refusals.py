"""What torus does not support is refused by name, or takes xDiT's path with one warning."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool
from tests.test_xdit_kernels import quantised

REFUSED: dict[str, dict[str, Any]] = {
    "dropout_p=0.5": {"dropout_p": 0.5},
    "is_causal=True": {"is_causal": True},
    "attention_kwargs['attn_mask'] of shape (2, 6, 32, 32)": {
        "attention_kwargs": {"attn_mask": torch.ones(2, 6, 32, 32, dtype=torch.bool)}
    },
    "attention_kwargs['attn_mask'] of shape (32, 32)": {
        "attention_kwargs": {"attn_mask": torch.ones(32, 32, dtype=torch.bool)}
    },
    "attention_kwargs['never_heard_of']": {"attention_kwargs": {"never_heard_of": 1}},
    "attention_kwargs['ulysses_extra_inputs']": {
        "attention_kwargs": {"ulysses_extra_inputs": ("gate",)}
    },
}
JOINT = {"joint": 5, "joint_strategy": "rear"}
REFUSED |= {
    f"attention_kwargs[{name!r}] with joint_strategy='rear'": {
        **JOINT,
        "attention_kwargs": {name: value},
    }
    for name, value in {
        "attn_mask": torch.ones(1, 1, 1, 32, dtype=torch.bool),
        "indices_k": torch.arange(64),
    }.items()
}


def messages(rank: int, world_size: int) -> dict[str, str]:
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    found = {}

    def refuse(name: str, **case: Any) -> None:
        with pytest.raises(NotImplementedError) as caught:
            xdit_calls.call(rank, **case)
        found[name] = str(caught.value)

    with xdit_cases.xdit_groups():
        xdit_calls.start()
        for name, case in REFUSED.items():
            refuse(name, **case)
        refuse("attention backend FLASH_4 on cpu", backend=AttentionBackendType.FLASH_4)
    return found


def test_error_names_the_argument_and_the_way_out(rank_pool: Callable[[int], RankPool]) -> None:
    for found in rank_pool(4).run(messages, timeout_s=120):
        assert len(found) == len(REFUSED) + 1
        for name, message in found.items():
            assert name in message
            assert "--sp-strategy torus" in message
            assert "--sp-fallback usp" in message


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What dispatch says inside."""
    handler, logger = Heard(), logging.getLogger("swiftfusion_xdit.xdit.dispatch")
    logger.addHandler(handler)
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)


def dense(size: int) -> dict[str, Any]:
    """A mask of the rows that `xdit_calls.call` has by default; it masks nothing."""
    return {"attention_kwargs": {"attn_mask": torch.ones(1, 1, 8 * size, 8 * size, dtype=bool)}}


# Forced by the user; a mesh with a ring, and a schedule that merges partial outputs.
SPLITTING: dict[str, dict[str, str]] = {
    "--sp-mesh torus=2,ulysses=1,ring=2, which splits them: it needs ring=1, got ring=2": {
        "sp_mesh": "torus=2,ulysses=1,ring=2"
    },
    "--sp-schedule, which must then be auto, pipelined or fused, got torus": {
        "sp_schedule": "torus"
    },
    "which must then be auto, pipelined or fused, got folded": {
        "sp_mesh": "torus=2,ulysses=2,ring=1",
        "sp_schedule": "folded",
    },
}


def splitting(rank: int, world_size: int, forced: dict[str, str]) -> list[str]:
    """What is said to a mask, and to a kernel of xDiT's; other calls run."""
    import xfuser.core.distributed.attention_backend as attention_backend

    sage = attention_backend.AttentionBackendType.SAGE
    registry = attention_backend.ATTENTION_FUNCTION_REGISTRY
    known = dict(registry)
    registry[sage] = quantised
    found = []
    try:
        with xdit_cases.xdit_groups():
            xdit_calls.start(**forced)
            for case in (dense(world_size), {"backend": sage}):
                with pytest.raises(NotImplementedError) as caught:
                    xdit_calls.call(rank, **case)
                found.append(str(caught.value))
            assert xdit_calls.call(rank) <= 2e-6
    finally:
        registry.clear()
        registry.update(known)
    return found


@pytest.mark.parametrize("expected", SPLITTING)
def test_forced_layouts_that_split_sequences(
    rank_pool: Callable[[int], RankPool], expected: str
) -> None:
    for mask, kernel in rank_pool(4).run(splitting, SPLITTING[expected], timeout_s=120):
        assert mask.startswith("--sp-strategy torus does not support attention_kwargs['attn_mask']")
        assert kernel.startswith("--sp-strategy torus does not support attention backend SAGE")
        for message in (mask, kernel):
            assert expected in message
            assert "--sp-fallback usp" in message


def fall_back_from_ring(rank: int, world_size: int) -> tuple[float, list[str]]:
    with heard() as messages, xdit_cases.xdit_groups():
        forced = {"sp_mesh": "torus=1,ulysses=1,ring=2", "sp_machines": "auto"}
        xdit_calls.start(sp_fallback="usp", ulysses_degree=2, ring_degree=1, **forced)
        arguments: dict[str, Any] = {"s_q": (8, 8), **dense(world_size)}
        return max(xdit_calls.call(rank, **arguments) for _ in range(2)), messages


def test_fallback_from_a_forced_ring(rank_pool: Callable[[int], RankPool]) -> None:
    for fallen, warnings in rank_pool(2).run(fall_back_from_ring, timeout_s=120):
        assert fallen <= 2e-6
        assert len(warnings) == 1
        assert "attn_mask" in warnings[0] and "needs ring=1, got ring=2" in warnings[0]


def fall_back(rank: int, world_size: int) -> tuple[float, float, list[str]]:
    with heard() as messages, xdit_cases.xdit_groups():
        xdit_calls.start(sp_fallback="usp", ulysses_degree=2, ring_degree=1)
        kwargs = {"attention_kwargs": {"never_heard_of": 1}}
        s_q = (8, 8)
        fallen = [xdit_calls.call(rank % 2, s_q=s_q, **kwargs) for _ in range(2)]
        return max(fallen), xdit_calls.call(rank % 2, s_q=s_q), messages


def test_fallback_warns_once_and_takes_xdits_path(rank_pool: Callable[[int], RankPool]) -> None:
    for fallen, own, warnings in rank_pool(2).run(fall_back, timeout_s=120):
        assert fallen <= 2e-6
        assert own <= 2e-6
        assert len(warnings) == 1
        assert "attention_kwargs['never_heard_of']" in warnings[0]


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "torus(2) * ulysses(2) * ring(2) = 8 != sp degree 4": (
        ValueError,
        {"sp_mesh": "torus=2,ulysses=2,ring=2"},
    ),
    "--sp-machines must divide the ranks: 4 ranks / 3 machines": (ValueError, {"sp_machines": "3"}),
    "tensor_parallel_degree=2": (
        NotImplementedError,
        {"ring_degree": 1, "tensor_parallel_degree": 2},
    ),
    "--sp-strategy must be one of usp, tas, torus, got 'ulyses'": (
        ValueError,
        {"strategy": "ulyses"},
    ),
    "--sp-transport must be one of": (ValueError, {"sp_transport": "tcp"}),
    "--sp-schedule must be one of": (ValueError, {"sp_schedule": "best"}),
    "--sp-mesh mesh must look like": (ValueError, {"sp_mesh": "2x2"}),
    "--sp-machines must be auto or a number": (ValueError, {"sp_machines": "0"}),
    "must divide the 6 heads": (
        ValueError,
        {"strategy": "tas", "sp_mesh": "torus=2,ulysses=2,ring=1"},
    ),
    "number of attention heads": (ValueError, {"strategy": "tas", "num_heads": None}),
}


def bad_starts(rank: int, world_size: int) -> dict[str, str]:
    found = {}
    for message, (error, arguments) in BAD.items():
        with xdit_cases.xdit_groups(), pytest.raises(error) as caught:
            xdit_calls.start(**arguments)
        found[message] = str(caught.value)
    return found


def test_bad_values_name_argument_rule_and_values(rank_pool: Callable[[int], RankPool]) -> None:
    for found in rank_pool(4).run(bad_starts, timeout_s=120):
        for expected, message in found.items():
            assert expected in message


def too_many_head_groups(rank: int, world_size: int) -> str:
    with xdit_cases.xdit_groups():
        xdit_calls.start(sp_mesh="torus=2,ulysses=2,ring=1", num_heads=3)
        q = xdit_cases.noise(1, 3, 8, 16)
        with pytest.raises(ValueError) as caught:
            xdit_calls.usp_module().USP(q, q, q)
    return str(caught.value)


def test_more_head_groups_than_heads(rank_pool: Callable[[int], RankPool]) -> None:
    for message in rank_pool(4).run(too_many_head_groups, timeout_s=60):
        assert "torus(2) * ulysses(2) = 4 head groups" in message
        assert "3 heads" in message
