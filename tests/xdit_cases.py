"""What runs models by diffusers in one process and by xDiT's own wrappers on many ranks.

Functions that ranks run (see tests.distributed) live here; each leaves no group of xDiT behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NUM_HEADS = 6  # not a multiple of 4: under torus head groups may be uneven
HEAD_DIM = 16
NUM_STEPS = 2


@contextlib.contextmanager
def xdit_groups() -> Iterator[None]:
    """Inside, xDiT's world group exists; all groups made inside are gone afterwards."""
    import torch.distributed as dist
    from xfuser.core.distributed import init_distributed_environment, parallel_state

    init_distributed_environment()
    known = set(dist.distributed_c10d._world.pg_map)
    try:
        yield
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        # xDiT leaves groups behind, each with threads, which would add up in a pool of ranks.
        for group in [made for made in dist.distributed_c10d._world.pg_map if made not in known]:
            dist.destroy_process_group(group)


def start(pipeline: Any, **arguments: Any) -> Any:
    """A runtime state of xDiT for ``pipeline``; returns the engine config."""
    import xfuser
    from xfuser.core.distributed import initialize_runtime_state

    config, _ = xfuser.xFuserArgs(model="tiny", **arguments).create_config()
    initialize_runtime_state(pipeline, config)
    return config


class Holder:
    """As much of a pipeline as xDiT's runtime state looks at."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Seeded weights in place of initial ones, some of which are zero and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_difference(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape, (out.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def largest_difference(outs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of several outputs of one pass."""
    pairs = zip(outs, expected, strict=True)
    return max(relative_difference(out, reference) for out, reference in pairs)


def run_transformer(
    wrapper_class: Any, config: dict[str, Any], inputs: dict[str, Any], **arguments: Any
) -> float:
    """How far one pass of xDiT's wrapper of a transformer is from the class that it wraps."""
    plain_class = wrapper_class.__mro__[1]
    plain = randomize(plain_class(**config), 0)
    expected = sample_of(plain(**inputs, return_dict=False))
    start(Holder(plain), **arguments)
    if "encoder_hidden_states" in inputs:
        describe_text(inputs["encoder_hidden_states"].shape[1])
    # Some finish in a from_config of their own; the others' knows no config but the default one.
    has_own = "from_config" in vars(wrapper_class)
    wrapper = wrapper_class.from_config(config) if has_own else wrapper_class(**config)
    wrapper.eval()
    wrapper.load_state_dict(plain.state_dict())
    if hasattr(wrapper, "_init_sp_state"):  # as xDiT's runner does
        wrapper._init_sp_state()
    return relative_difference(sample_of(wrapper(**inputs, return_dict=False)), expected)


def run_around(
    wrapper_class: Any,
    plain_class: Any,
    config: dict[str, Any],
    inputs: dict[str, Any],
    **arguments: Any,
) -> float:
    """Like :func:`run_transformer`, for a wrapper that holds an object of the plain class."""
    plain = randomize(plain_class(**config), 0)
    expected = sample_of(plain(**inputs, return_dict=False))
    start(Holder(plain), **arguments)
    wrapper = wrapper_class(plain)
    return relative_difference(sample_of(wrapper(**inputs, return_dict=False)), expected)


def sample_of(output: tuple[Any, ...]) -> Tensor:
    """The sample of a transformer's output; some give a list of samples."""
    return output[0] if isinstance(output[0], Tensor) else torch.stack(output[0])


def describe_text(num_tokens: int) -> None:
    """What xDiT's runner tells the runtime state before it calls a transformer."""
    from xfuser.core.distributed import get_runtime_state, get_sequence_parallel_world_size

    state = get_runtime_state()
    state.max_condition_sequence_length = num_tokens
    state.split_text_embed_in_sp = num_tokens % get_sequence_parallel_world_size() == 0


def run_pipeline(
    wrapper: str, build: Callable[[], tuple[Any, dict[str, Any]]], **arguments: Any
) -> float | None:
    """How far a pipeline under xfuser's class ``wrapper`` is from diffusers' own.

    None on a rank to which xDiT gives no result.
    """
    import xfuser

    pipeline, call = build()
    pipeline.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": NUM_STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    expected = pipeline(**call, **common, return_dict=False)[0]
    pipeline, call = build()
    pipeline.set_progress_bar_config(disable=True)
    arguments = {key: call[key] for key in ("height", "width", "num_frames") if key in call} | {
        "num_inference_steps": NUM_STEPS,
        "output_type": "latent",
        **arguments,
    }
    config, _ = xfuser.xFuserArgs(model="tiny", **arguments).create_config()
    out = getattr(xfuser, wrapper)(pipeline, config)(**call, **common, return_dict=False)
    # xDiT hands the result out on the last rank of a data-parallel group only.
    if out is None or not isinstance(out[0], Tensor):
        return None
    return relative_difference(out[0], expected)
