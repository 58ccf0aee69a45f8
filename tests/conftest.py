"""Fixtures and settings that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tests.distributed import RankPool

# Timing never decides a test, so no deadline; a failing example prints what replays it.
settings.register_profile("swiftfusion", deadline=None, print_blob=True)
settings.load_profile("swiftfusion")


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """`rank_pool(n)` is a pool of n ranks, the same one for the whole session."""
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()
