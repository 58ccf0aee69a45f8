"""xDiT on CPU ranks, where no accelerator exists: every change that it takes.

xDiT asks which accelerator there is while its modules execute, and its runner and examples name
``cuda`` in places. Each function below belongs to one module and is applied right after that
module has executed, so that later modules copy what was changed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from swiftfusion_xdit.xdit.patches import Patches


@functools.cache
def is_wanted() -> bool:
    """Whether this process has no accelerator that xDiT could use."""
    others = (getattr(torch, name, None) for name in ("npu", "musa", "xpu"))
    return not (
        torch.cuda.is_available()
        or torch.backends.mps.is_available()
        or any(other is not None and other.is_available() for other in others)
    )


def apply(module: ModuleType, patches: Patches) -> None:
    """Make the changes that belong to ``module``, if there are any."""
    change = _CHANGES.get(module.__name__)
    if change is not None:
        change(module, patches)


def _change_envs(envs: ModuleType, patches: Patches) -> None:
    """The device is cpu and the backend gloo, also with a CUDA build of torch and no GPU."""
    answers = {
        "_is_cuda": False,
        "_is_hip": False,
        "get_device_version": None,
        "get_torch_distributed_backend": "gloo",
    }
    for name, answer in answers.items():
        patches.set(envs, name, _always(answer), follow=True)
    checker = envs.PACKAGES_CHECKER
    # yunchang makes the Ulysses and Ring groups; xDiT looks for it on accelerators only.
    patches.set_item(checker.packages_info, "has_long_ctx_attn", True)
    for probe in ("_on_rdna4", "_on_mi3xx"):
        patches.set(checker, probe, _always(False))
    _change_torch(patches)
    _change_diffusers(patches)


def _always(answer: Any) -> Callable[..., Any]:
    """A function of its own that takes anything and gives ``answer``."""
    return lambda *_, **__: answer


class HostEvent:
    """torch.cuda.Event over the host's clock: CPU work is done when it returns."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._recorded_s = 0.0

    def record(self, stream: object = None) -> None:
        self._recorded_s = time.monotonic()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    wait = synchronize

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to ``end``."""
        return (end._recorded_s - self._recorded_s) * 1e3


class _GeneratorMeta(type(torch.Generator)):  # type: ignore[misc]
    """isinstance accepts torch's own generators, such as torch.default_generator."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _TorchGenerator)


_TorchGenerator = torch.Generator


class HostGenerator(_TorchGenerator, metaclass=_GeneratorMeta):
    """torch.Generator that makes a CPU generator where a CUDA one is asked for."""

    def __new__(cls, device: Any = "cpu") -> HostGenerator:
        new: Any = _TorchGenerator.__new__
        return new(cls, device=host_device(device))


def host_device(device: Any) -> Any:
    """``cpu`` in place of a CUDA device; anything else as it is."""
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    if isinstance(device, (str, torch.device)) and str(device).partition(":")[0] == "cuda":
        return "cpu"
    return device


def _change_torch(patches: Patches) -> None:
    """What xDiT's runner and examples call in torch.cuda without asking whether it is there."""
    replacements: dict[str, Any] = {
        "Event": HostEvent,
        # What is launched on a CPU is complete when the call returns.
        "synchronize": _always(None),
        "set_device": _always(None),
        "current_device": _always(0),
        "reset_peak_memory_stats": _always(None),
        "max_memory_allocated": _always(0),
        "memory_allocated": _always(0),
        "max_memory_reserved": _always(0),
    }
    for name, replacement in replacements.items():
        patches.set(torch.cuda, name, replacement, follow=True)
    patches.set(torch, "Generator", HostGenerator, follow=True)


def _change_diffusers(patches: Patches) -> None:
    from diffusers import DiffusionPipeline

    original: Callable[..., Any] = DiffusionPipeline.to

    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = host_device(kwargs["device"])
        return original(self, *map(host_device, args), **kwargs)

    patches.set(DiffusionPipeline, "to", to)


def _bind_process_group(module: ModuleType, patches: Patches) -> None:
    """These modules take yunchang's groups only where an accelerator is found."""
    from yunchang.globals import PROCESS_GROUP

    patches.set(module, "PROCESS_GROUP", PROCESS_GROUP)


def flash_attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """xDiT's SDPA_FLASH on CPU: ``[b, h, s, d]`` to out and natural-log LSE ``[b, h, s]``.

    Where it stands in for SDPA it must honour what that does: ``attn_mask``, boolean or added.
    """
    mask = (attention_kwargs or {}).get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p=dropout_p, is_causal=is_causal, attn_mask=mask
    )
    return out, lse


def _register_attention(module: ModuleType, patches: Patches) -> None:
    """A backend with an LSE, without which xDiT's Ring cannot merge."""
    backend = module.AttentionBackendType.SDPA_FLASH
    patches.set_item(module.ATTENTION_FUNCTION_REGISTRY, backend, flash_attention_with_lse)


def _select_cpu_backend(module: ModuleType, patches: Patches) -> None:
    """Where no backend is named, one that runs here, and with an LSE if a ring needs it.

    A CUDA build of torch has cuDNN, and xDiT would take that, also where there is no GPU.
    """
    state_class, backends = module.RuntimeState, module.AttentionBackendType
    original = state_class._select_attention_backend

    @functools.wraps(original)
    def select(self: Any, engine_config: Any = None) -> Any:
        if engine_config and engine_config.runtime_config.attention_backend:
            return original(self, engine_config)
        has_ring = self.parallel_config.ring_degree > 1
        return backends.SDPA_FLASH if has_ring else backends.SDPA

    patches.set(state_class, "_select_attention_backend", select)


_CHANGES: dict[str, Callable[[ModuleType, Patches], None]] = {
    "xfuser.envs": _change_envs,
    "xfuser.core.distributed.attention_backend": _register_attention,
    "xfuser.core.distributed.fp8_comms": _bind_process_group,
    "xfuser.core.sparge_attention.head_balance": _bind_process_group,
    "xfuser.core.distributed.runtime_state": _select_cpu_backend,
    "xfuser.model_executor.layers.usp": _bind_process_group,
}
