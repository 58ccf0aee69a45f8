"""Models through xDiT's own wrappers under torus agree with diffusers in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import xdit_models
from tests.distributed import RankPool

TOLERANCE = 1e-5
MESHES = (
    "torus=2,ulysses=1,ring=2",
    "torus=2,ulysses=2,ring=1",
    "torus=1,ulysses=1,ring=4",
)


CASES = [
    (name, feature) for name in xdit_models.NAMES for feature in xdit_models.load(name).FEATURES
]


def differences(rank: int, world_size: int, name: str, feature: str) -> dict[str, float | None]:
    arguments: dict[str, Any] = {"ulysses_degree": 2, "ring_degree": 2, "sp_machines": "2"}
    return {
        mesh: xdit_models.run(name, feature, sp_strategy="torus", sp_mesh=mesh, **arguments)
        for mesh in MESHES
    }


@pytest.mark.parametrize(("name", "feature"), CASES)
def test_agrees_with_one_process(
    rank_pool: Callable[[int], RankPool], name: str, feature: str
) -> None:
    results = rank_pool(4).run(differences, name, feature, timeout_s=180)
    for mesh in MESHES:
        values = [result[mesh] for result in results if result[mesh] is not None]
        assert values and max(values) <= TOLERANCE, (name, feature, mesh, results)


def cfg_parallel(rank: int, world_size: int, strategy: str) -> float | None:
    return xdit_models.run(
        "sd3",
        "uneven text",
        sp_strategy=strategy,
        sp_machines="2",
        ulysses_degree=2,
        use_cfg_parallel=True,
    )


def test_agrees_with_cfg_parallel(rank_pool: Callable[[int], RankPool]) -> None:
    results = rank_pool(4).run(cfg_parallel, "torus", timeout_s=120)
    values = [value for value in results if value is not None]
    assert values and max(values) <= TOLERANCE, results
