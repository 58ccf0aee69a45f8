"""xDiT's side of model_step.py: its groups, its model with weights, the ceiling, compiling."""

from __future__ import annotations

import copy
import functools
import importlib
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.model_step_config import NORM_WEIGHT, SEED, STATE, Settings
from benchmarks.step_models import Latents, Make
from swiftfusion_xdit.attention import attend, select_backend
from swiftfusion_xdit.cli.bench_stock import GROUPS, RANK_GROUPS


class XditStates:
    """xDiT's groups and runtime state for each pair of degrees; one pair is in place at a time."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._pipeline = SimpleNamespace(transformer=model)
        self._settings = settings
        self._made: dict[tuple[int, int], list[tuple[Any, str, Any]]] = {}

    def use(self, ulysses: int, ring: int, backend: str) -> Any:
        """Put them in place; the runtime state. Collective.

        Raises:
            RuntimeError: xDiT's own reason why this backend does not run here.
        """
        from xfuser.core.distributed import get_runtime_state

        if (ulysses, ring) not in self._made:
            self._make(ulysses, ring)
        for owner, name, value in self._made[ulysses, ring]:
            setattr(owner, name, value)
        state = get_runtime_state()
        state.set_attention_backend(backend)
        return state

    def _make(self, ulysses: int, ring: int) -> None:
        import xfuser
        from xfuser.core.distributed import (
            init_distributed_environment,
            initialize_runtime_state,
            parallel_state,
            runtime_state,
        )
        from yunchang.globals import PROCESS_GROUP

        for name in GROUPS:
            setattr(parallel_state, name, None)
        init_distributed_environment()
        config, _ = xfuser.xFuserArgs(
            model=self._settings.model,
            ulysses_degree=ulysses,
            ring_degree=ring,
            attention_backend=self._settings.backends[0],
        ).create_config()
        initialize_runtime_state(self._pipeline, config)
        kept = [(parallel_state, GROUPS), (PROCESS_GROUP, RANK_GROUPS), (runtime_state, STATE)]
        self._made[ulysses, ring] = [
            (owner, name, getattr(owner, name)) for owner, names in kept for name in names
        ]


def build_model(settings: Settings, device: torch.device) -> nn.Module:
    """The transformer with the same random weights on every rank."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with device:
            model = settings.module.build(settings.config)
    finally:
        torch.set_default_dtype(before)
    model = model.to(settings.dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(NORM_WEIGHT)
        dist.broadcast(parameter, src=0)  # GPUs of different kinds draw different numbers
    return model


def step_inputs(settings: Settings, latents: Latents, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(SEED + latents.image_tokens)
    make = Make(dist.get_rank(), settings.ranks, device, settings.dtype, generator)
    return settings.module.inputs(settings.config, latents, make)


@functools.cache
def _kernel(name: str, device: torch.device) -> Any:
    return select_backend(name, device)


def _attend(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
    scale = q.shape[3] ** -0.5
    return attend(q, k, v, scale=scale, backend=_kernel(kernel, q.device))[0].contiguous()


_attend_op = torch.library.custom_op("model_step::attend", _attend, mutates_args=())
_attend_op.register_fake(lambda q, k, v, kernel: torch.empty_like(q).contiguous())


def without_communication(kernel: str, ranks: int) -> Callable[..., Tensor]:
    """A stand-in for a USP call: no peer takes part, and the kernel's work is the same."""

    def dispatch(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        b, h, s, d = query.shape
        # Rows of [b, s, h, d] cut into narrower rows: a view.
        q, k, v = (
            x.transpose(1, 2).reshape(b, s * ranks, h // ranks, d) for x in (query, key, value)
        )
        run = _attend_op if torch.compiler.is_compiling() else _attend
        return run(q, k, v, kernel).reshape(b, s, h, d).transpose(1, 2)

    return dispatch


@functools.cache
def _class_of(kind: type, name: str) -> type:
    forward: Any = kind.forward
    code = forward.__code__.replace(co_name=name)
    own = FunctionType(code, forward.__globals__, name, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": own})


def view_of(module: Any, name: str) -> Any:
    """The same module with the same weights, whose forward is compiled apart from all others'.

    torch.compile keeps what it compiled with a function's code object, and whether its guards tell
    strategies apart is not for a benchmark to rely on. Modules of one class share it under a name,
    as they do without it: blocks are compiled once for all.
    """
    view = copy.copy(module)
    view.__class__ = _class_of(type(module), name)
    for key, value in vars(view).items():
        # Submodules, hooks and so on are the view's own; a config is a dict of a class of its own.
        if type(value) in (dict, OrderedDict):
            vars(view)[key] = value.copy()
    return view


def compiled_by_xdit(model: Any, module: Any, name: str, how: str, mode: str | None) -> Any:
    """The transformer as xDiT's runner for it compiles it.

    Args:
        module: of ``step_models``.
        how: ``whole``, or ``blocks``, as xDiT does where weights are sharded.
        mode: of torch.compile; None: xDiT's.
    """
    from xfuser.model_executor.models.runner_models.base_model import xFuserModel

    view = view_of(model, name)
    kind = getattr(importlib.import_module(module.RUNNER[0]), module.RUNNER[1])
    runner: Any = object.__new__(kind)
    degree = 1
    if how == "blocks":
        degree = 2
        for part in module.BLOCKS:
            view._modules[part] = nn.ModuleList(view_of(x, name) for x in getattr(model, part))
    runner.config = SimpleNamespace(fully_shard_degree=degree, cache_method=None)
    runner.pipe = SimpleNamespace(transformer=view)
    if mode is not None:
        runner._get_compile_mode = lambda: mode
    # There is no pipeline here; we warm up.
    runner._run_compile_warmup = runner._run_timed_pipe = lambda _: None
    compile_model = xFuserModel._compile_model if how == "blocks" else kind._compile_model
    compile_model(runner, {})
    return runner.pipe.transformer


def compiler_counts() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {
        "graph breaks": sum(counters["graph_break"].values()),
        "graphs without CUDA graph": counters["inductor"]["cudagraph_skips"],
    }
