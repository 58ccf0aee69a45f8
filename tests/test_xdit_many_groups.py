"""Several SP groups at once, by CFG and data parallelism, agree with diffusers in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import xdit_cases
from tests.distributed import RankPool

TOLERANCE = 1e-5
SIZE = 128
PROMPTS = ["a torus", "a ring above the sea", "two rings", "a knot"]

DEGREES: dict[str, dict[str, Any]] = {
    "cfg": {"use_cfg_parallel": True},
    "data": {"data_parallel_degree": 2},
    "cfg and data": {"use_cfg_parallel": True, "data_parallel_degree": 2},
}
# Machines that 4 ranks are split over: an SP group of 2 lies in one machine, or spans two.
MACHINES = ("2", "4")


def transformers(rank: int, world_size: int, degrees: str, machines: str) -> float:
    """Wan with other rows in every group: the groups' layers and lengths have nothing in common."""
    from tests.xdit_models import wan

    feature = ("even", "uneven image")[rank // 2 % 2]
    wrapper, config, inputs = wan.build(feature)
    inputs["hidden_states"] = inputs["hidden_states"] * (1 + rank // 2)
    arguments = {"sp_strategy": "torus", "sp_machines": machines, "ulysses_degree": 2}
    with xdit_cases.xdit_groups(), torch.no_grad():
        return xdit_cases.run_transformer(wrapper, config, inputs, **arguments, **DEGREES[degrees])


@pytest.mark.parametrize("machines", MACHINES)
@pytest.mark.parametrize("degrees", ["cfg", "data"])
def test_transformer_in_every_group(
    rank_pool: Callable[[int], RankPool], degrees: str, machines: str
) -> None:
    results = rank_pool(4).run(transformers, degrees, machines, timeout_s=180)
    assert max(results) <= TOLERANCE, results


@pytest.mark.slow
def test_transformer_in_four_groups(rank_pool: Callable[[int], RankPool]) -> None:
    results = rank_pool(8).run(transformers, "cfg and data", "4", timeout_s=300)
    assert max(results) <= TOLERANCE, results


def pipelines(rank: int, world_size: int, degrees: str, machines: str) -> float | None:
    """SD3 from prompts; xDiT gives each data-parallel group its share of them."""
    import xfuser
    from xfuser.core.distributed import get_world_group

    num_groups = DEGREES[degrees].get("data_parallel_degree", 1)
    per_group = len(PROMPTS) // num_groups
    group = rank // (world_size // num_groups)
    mine = PROMPTS[group * per_group : (group + 1) * per_group]
    common = {"height": SIZE, "width": SIZE, "num_inference_steps": xdit_cases.NUM_STEPS}
    with xdit_cases.xdit_groups(), torch.no_grad():
        call = {**common, "guidance_scale": 4.0, "output_type": "latent"}
        expected = prompted()(mine, generator=seeded(), **call, return_dict=False)[0]
        config, _ = xfuser.xFuserArgs(
            model="tiny",
            prompt=PROMPTS,
            **common,
            output_type="latent",
            sp_strategy="torus",
            sp_machines=machines,
            ulysses_degree=2,
            **DEGREES[degrees],
        ).create_config()
        assert get_world_group().rank == rank
        pipeline = xfuser.xFuserStableDiffusion3Pipeline(prompted(), config)
        out = pipeline(prompt=PROMPTS, generator=seeded(), **call, return_dict=False)
        return None if out is None else xdit_cases.relative_difference(out[0], expected)


def prompted() -> Any:
    """Tiny SD3 with its text encoders."""
    from diffusers import StableDiffusion3Pipeline

    from swiftfusion_xdit.cli.tiny_models import MODELS

    torch.manual_seed(0)
    parts = MODELS["sd3"].build(xdit_cases.NUM_HEADS)
    xdit_cases.randomize(parts["transformer"], 0)
    parts = {name: part for name, part in parts.items() if part is not None}
    pipeline = StableDiffusion3Pipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("degrees", ["cfg", "data"])
def test_pipeline_of_every_group(rank_pool: Callable[[int], RankPool], degrees: str) -> None:
    results = rank_pool(4).run(pipelines, degrees, "4", timeout_s=180)
    given = [result for result in results if result is not None]
    assert len(given) == DEGREES[degrees].get("data_parallel_degree", 1)
    assert max(given) <= TOLERANCE, results


@pytest.mark.slow
def test_pipeline_of_four_groups(rank_pool: Callable[[int], RankPool]) -> None:
    results = rank_pool(8).run(pipelines, "cfg and data", "4", timeout_s=300)
    given = [result for result in results if result is not None]
    assert len(given) == 2
    assert max(given) <= TOLERANCE, results
