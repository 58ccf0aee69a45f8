"""usp leaves USP and the groups alone; tas lays out the groups by the paper; torus keeps both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swiftfusion_xdit.xdit import hooks
from tests import xdit_calls, xdit_cases
from tests.distributed import RankPool


def layout() -> dict[str, Any]:
    import torch.distributed as dist
    from xfuser.core.distributed import get_sp_group
    from yunchang.globals import PROCESS_GROUP

    group = get_sp_group()
    assert group.ulysses_group is PROCESS_GROUP.ULYSSES_PG
    assert group.ring_group is PROCESS_GROUP.RING_PG
    for name in ("ulysses", "ring"):
        made = getattr(group, f"{name}_group")
        assert getattr(group, f"{name}_world_size") == dist.get_world_size(made)
        assert getattr(group, f"{name}_rank") == dist.get_rank(made)
    return {
        "sp": list(group.ranks),
        "ulysses": dist.get_process_group_ranks(group.ulysses_group),
        "ring": dist.get_process_group_ranks(group.ring_group),
    }


def stock(rank: int, world_size: int) -> dict[str, Any]:
    """xDiT without the plugin's runtime state hooks, for comparison."""
    from xfuser.core.distributed import initialize_model_parallel

    with xdit_cases.xdit_groups():
        initialize_model_parallel(ulysses_degree=2, ring_degree=2)
        return layout()


def with_strategy(rank: int, world_size: int, strategy: str, arguments: Any) -> dict[str, Any]:
    usp = xdit_calls.usp_module()
    code = usp.USP.__code__
    with xdit_cases.xdit_groups():
        config = xdit_calls.start(strategy, **arguments).parallel_config
        found = layout()
        found["is_original"] = usp.USP.__code__ is code and code.co_filename == usp.__file__
        found["degrees"] = (config.ulysses_degree, config.ring_degree)
        size = config.sp_degree
        found["error"] = xdit_calls.call(found["sp"].index(rank), s_q=(8,) * size)
    found["restored"] = usp.USP.__code__ is code
    return found


def test_usp_is_untouched(rank_pool: Callable[[int], RankPool]) -> None:
    expected = rank_pool(4).run(stock, timeout_s=60)
    for rank, found in enumerate(rank_pool(4).run(with_strategy, "usp", {}, timeout_s=60)):
        assert found["is_original"]
        assert {name: found[name] for name in ("sp", "ulysses", "ring")} == expected[rank]
        assert found["error"] <= 2e-6


def test_torus_keeps_xdits_groups(rank_pool: Callable[[int], RankPool]) -> None:
    expected = rank_pool(4).run(stock, timeout_s=60)
    for rank, found in enumerate(rank_pool(4).run(with_strategy, "torus", {}, timeout_s=60)):
        assert not found["is_original"]
        assert found["restored"], "destroying the groups gives USP its own code back"
        assert {name: found[name] for name in ("sp", "ulysses", "ring")} == expected[rank]


def test_tas_crosses_machines_with_ulysses(rank_pool: Callable[[int], RankPool]) -> None:
    # 2 machines x 2 ranks, 6 heads: gcd(4, 6) = 2 ranks exchange heads, one on each machine.
    for rank, found in enumerate(rank_pool(4).run(with_strategy, "tas", {}, timeout_s=60)):
        assert found["is_original"]
        assert found["sp"] == [0, 1, 2, 3]
        assert found["ulysses"] == [rank % 2, rank % 2 + 2]
        assert found["ring"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found["degrees"] == (2, 2)
        assert found["error"] <= 2e-6


def test_tas_degrees_follow_the_heads(rank_pool: Callable[[int], RankPool]) -> None:
    # 8 heads: gcd(4, 8) = 4, so no ring is left although xDiT was given one.
    arguments = {"num_heads": 8, "sp_mesh": None}
    for found in rank_pool(4).run(tas_layout, arguments, timeout_s=60):
        assert found["ulysses"] == [0, 1, 2, 3]
        assert len(found["ring"]) == 1


def tas_layout(rank: int, world_size: int, arguments: Any) -> dict[str, Any]:
    with xdit_cases.xdit_groups():
        xdit_calls.start("tas", **arguments)
        return layout()


def test_tas_with_cfg_parallel(rank_pool: Callable[[int], RankPool]) -> None:
    # Two SP groups of two ranks, each within one of the two machines.
    arguments = {"ring_degree": 1, "use_cfg_parallel": True}
    for rank, found in enumerate(rank_pool(4).run(with_strategy, "tas", arguments, timeout_s=60)):
        assert found["sp"] == found["ulysses"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found["error"] <= 2e-6


def destroyed_tas(rank: int, world_size: int) -> bool:
    with xdit_cases.xdit_groups():
        xdit_calls.start("tas")
        assert len(hooks._layout)
    return not len(hooks._layout)


def test_destroying_the_groups_ends_the_layout(rank_pool: Callable[[int], RankPool]) -> None:
    assert all(rank_pool(4).run(destroyed_tas, timeout_s=60))
