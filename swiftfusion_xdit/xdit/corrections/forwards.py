"""Calls of a transformer's forward: its arguments by name, its result, one sample at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def bind(forward: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of ``forward(model, ...)`` by name, without ``self``."""
    bound = inspect.signature(forward).bind(model, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def with_sample(output: Any, sample: Tensor | list[Tensor]) -> Any:
    """An output of diffusers, or the tuple in its place, with another sample or list of them."""
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


def sample_by_sample(
    forward: Callable[[dict[str, Any]], Any], arguments: dict[str, Any], batch: int
) -> Any:
    """``forward(arguments)`` of each sample alone; tensors of length ``batch`` are cut up."""

    def of_sample(i: int) -> dict[str, Any]:
        return {
            name: value[i : i + 1] if isinstance(value, Tensor) and len(value) == batch else value
            for name, value in arguments.items()
        }

    outputs = [forward(of_sample(i)) for i in range(batch)]
    return with_sample(outputs[0], torch.cat([output[0] for output in outputs]))
