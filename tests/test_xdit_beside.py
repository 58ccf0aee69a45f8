"""Torus beside sharded weights and under torch.compile: whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import xdit_cases
from tests.distributed import RankPool
from tests.xdit_models import wan

TOLERANCE = 1e-5


def by_torch(wrapper: Any, group: Any) -> Any:
    """Each block's weights shared out by torch itself."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (group.size(),))
    for block in wrapper.blocks:
        fully_shard(block, mesh=mesh)
    return wrapper


def by_xdit(wrapper: Any, group: Any) -> Any:
    """As xDiT's --fully_shard_degree does with --memory_efficient_sharding, block by block.

    Without it xDiT takes torch's FullyShardedDataParallel, which refuses CPU ranks.
    """
    from xfuser.core.distributed import shard_component

    return shard_component(
        wrapper,
        wrap_attrs=["blocks"],
        process_group=group,
        device_id=0,
        memory_efficient_init=True,
    )


def sharded(rank: int, world_size: int, shard: Callable[..., Any]) -> tuple[float, float]:
    """Wan with its weights shared out; the error, and which part of a block's a rank holds."""
    wrapper_class, config, inputs = wan.build("uneven image")
    with xdit_cases.xdit_groups(), torch.no_grad():
        plain = xdit_cases.randomize(wrapper_class.__mro__[1](**config), 0)
        expected = plain(**inputs, return_dict=False)[0]
        arguments = {"ulysses_degree": 2, "ring_degree": 2, "sp_machines": "2"}
        xdit_cases.start(xdit_cases.Holder(plain), sp_strategy="torus", **arguments)
        wrapper = wrapper_class(**config).eval()
        wrapper.load_state_dict(plain.state_dict())
        from xfuser.core.distributed import get_world_group

        model = shard(wrapper, get_world_group().device_group)
        weight = model.blocks[0].attn1.to_q.weight
        share = weight.to_local().numel() / weight.numel()
        out = model(**inputs, return_dict=False)[0]
        return xdit_cases.relative_difference(out, expected), share


@pytest.mark.parametrize("shard", [by_torch, by_xdit])
def test_fully_sharded_weights(
    rank_pool: Callable[[int], RankPool], shard: Callable[..., Any]
) -> None:
    for error, share in rank_pool(4).run(sharded, shard, timeout_s=120):
        assert share == 1 / 4
        assert error <= TOLERANCE


def compiled(rank: int, world_size: int, name: str, feature: str) -> float:
    """A model whose wrapper is corrected, compiled as a whole; graphs may break."""
    from tests import xdit_models

    wrapper_class, config, inputs = xdit_models.load(name).build(feature)
    with xdit_cases.xdit_groups(), torch.no_grad():
        plain = xdit_cases.randomize(wrapper_class.__mro__[1](**config), 0)
        expected = plain(**inputs, return_dict=False)[0]
        arguments = {"ulysses_degree": 2, "ring_degree": 2, "sp_machines": "2"}
        xdit_cases.start(xdit_cases.Holder(plain), sp_strategy="torus", **arguments)
        xdit_cases.describe_text(inputs["encoder_hidden_states"].shape[1])
        wrapper = wrapper_class(**config).eval()
        wrapper.load_state_dict(plain.state_dict())
        try:
            run = torch.compile(wrapper, backend="aot_eager")
            outs = [run(**inputs, return_dict=False)[0] for _ in range(2)]
        finally:
            torch._dynamo.reset()
        return max(xdit_cases.relative_difference(out, expected) for out in outs)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("wan", "uneven image"),
        ("flux", "uneven text"),
        ("qwen_image", "uneven image"),
        ("krea2", "uneven image"),
    ],
)
def test_compiled_models(rank_pool: Callable[[int], RankPool], name: str, feature: str) -> None:
    errors = rank_pool(4).run(compiled, name, feature, timeout_s=240)
    assert max(errors) <= TOLERANCE, errors
