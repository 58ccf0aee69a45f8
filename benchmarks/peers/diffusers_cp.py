"""diffusers' context parallelism: Ulysses, ring, both, and their variants for any length.

Models call `dispatch_attention_fn` with the `ParallelConfig` that `enable_parallelism` has set up;
here it is set up in the same way, for one call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.base import (
    HOST_SYNC,
    Layer,
    Mode,
    NotRunnable,
    Peer,
    Setting,
    hybrid_mesh,
    require_even,
)
from swiftfusion_xdit.cli.bench_config import Shape

ALWAYS = {"cudnn": "_native_cudnn", "sdpa_flash": "_native_flash"}
IF_ASKED = {"fa2": "flash", "fa3": "_flash_3"}


class Diffusers(Peer):
    name = "diffusers"
    package = "diffusers"
    module = "diffusers"

    def modes(self, setting: Setting) -> list[Mode]:
        if not setting.on_gpu:
            return self._modes_of("cpu", "native", setting)
        wanted = {**ALWAYS, **{k: v for k, v in IF_ASKED.items() if k in setting.backends}}
        found = [
            mode
            for backend, kernel in wanted.items()
            for mode in self._modes_of(backend, kernel, setting)
        ]
        if "fa4" in setting.backends:
            found.append(
                Mode(
                    "flash_4_hub",
                    "fa4",
                    reason="diffusers registers FlashAttention 4 without context parallelism",
                )
            )
        return found

    def _modes_of(self, backend: str, kernel: str, setting: Setting) -> list[Mode]:
        ranks = setting.ranks
        no_lse = "" if setting.on_gpu else "ring needs a log-sum-exp, which kernel native lacks"
        modes = []
        for ulysses, ring in setting.hybrids():
            name = f"ulysses {ulysses} ring {ring}"
            reason = no_lse if ring > 1 else ""
            modes.append(Mode(f"{name} {kernel}", backend, kernel, ulysses, ring, reason=reason))
        for name, ulysses, ring in (("ulysses", ranks, 1), ("ring", 1, ranks)):
            modes.append(
                Mode(
                    f"{name}_anything {kernel}",
                    backend,
                    kernel,
                    ulysses,
                    ring,
                    options=(f"{name}_anything",),
                    reason=no_lse if ring > 1 else "",
                    graph_reason=HOST_SYNC,
                )
            )
        return modes

    def layer(self, mode: Mode, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Layer:
        from diffusers.models import attention_dispatch as dispatch

        if not mode.options:
            require_even(shape, ranks=dist.get_world_size(), ulysses=mode.ulysses)
        backend = dispatch.AttentionBackendName(mode.kernel)
        try:
            dispatch._check_attention_backend_requirements(backend)
        except RuntimeError as error:
            raise NotRunnable(str(error)) from None
        config = _parallel_config(mode, q.device)
        attend = dispatch.dispatch_attention_fn
        return lambda: attend(q, k, v, backend=backend, parallel_config=config)


def _parallel_config(mode: Mode, device: torch.device) -> Any:
    from diffusers.models import _modeling_parallel as parallel

    switches: dict[str, Any] = dict.fromkeys(mode.options, True)
    degrees = {"ulysses_degree": mode.ulysses, "ring_degree": mode.ring}
    context = parallel.ContextParallelConfig(**degrees, **switches)
    config = parallel.ParallelConfig(context_parallel_config=context)
    mesh = hybrid_mesh(device.type, mode.ulysses, mode.ring)
    config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    return config
