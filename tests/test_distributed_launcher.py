"""The rank launcher itself: results, failures, deaths, timeouts, environment, pools."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailure, RankPool, run_ranks


def sum_over_ranks(rank: int, world_size: int, start: int) -> tuple[int, torch.Tensor]:
    value = torch.tensor([float(start + rank)])
    dist.all_reduce(value)
    return rank, value


def raise_on(rank: int, world_size: int, bad_rank: int) -> None:
    if rank == bad_rank:
        raise KeyError(f"bad rank {bad_rank}")
    dist.barrier()


def die_on(rank: int, world_size: int, bad_rank: int) -> int:
    dist.barrier()  # the others are connected by now
    if rank == bad_rank:
        time.sleep(0.5)  # and have left the barrier
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def sleep_on(rank: int, world_size: int, slow_rank: int) -> int:
    if rank == slow_rank:
        time.sleep(600)
    return rank


def read_env(rank: int, world_size: int, name: str) -> tuple[str | None, str, int]:
    return os.environ.get(name), os.environ["RANK"], os.getpid()


def test_results_in_rank_order() -> None:
    results = run_ranks(3, sum_over_ranks, 5)
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert all(value.item() == 18.0 for _, value in results)


def test_failure_names_rank_and_keeps_cause_while_others_wait() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2 failed in .*raise_on\(1,\)") as info:
        run_ranks(2, raise_on, 1)
    assert info.value.rank == 1
    assert isinstance(info.value.__cause__, KeyError)
    assert "in raise_on" in str(info.value)


def test_death_is_a_failure_unless_allowed() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 ended \(signal SIGKILL\)"):
        run_ranks(2, die_on, 1)
    assert run_ranks(2, die_on, 1, may_die=[1]) == [0, None]


def test_timeout_shows_where_ranks_were() -> None:
    with pytest.raises(RankFailure, match=r"ranks 1 of 2 not done after 2.0 s") as info:
        run_ranks(2, sleep_on, 1, timeout_s=2.0)
    assert "in sleep_on" in str(info.value)


def test_ranks_see_the_environment_of_the_call(
    monkeypatch: pytest.MonkeyPatch, rank_pool: Callable[[int], RankPool]
) -> None:
    monkeypatch.setenv("SWIFTFUSION_LAUNCHER_TEST", "first")
    first = rank_pool(2).run(read_env, "SWIFTFUSION_LAUNCHER_TEST")
    monkeypatch.delenv("SWIFTFUSION_LAUNCHER_TEST")
    second = rank_pool(2).run(read_env, "SWIFTFUSION_LAUNCHER_TEST")
    assert [value for value, _, _ in first] == ["first", "first"]
    assert [value for value, _, _ in second] == [None, None]
    assert [rank for _, rank, _ in second] == ["0", "1"]
    assert [pid for _, _, pid in first] == [pid for _, _, pid in second]


def test_pool_starts_anew_after_a_failure() -> None:
    with RankPool(2) as pool:
        before = pool.run(read_env, "HOME")
        with pytest.raises(RankFailure):
            pool.run(raise_on, 0)
        after = pool.run(read_env, "HOME")
        assert {pid for _, _, pid in before}.isdisjoint(pid for _, _, pid in after)
        assert [value.item() for _, value in pool.run(sum_over_ranks, 1)] == [3.0, 3.0]
