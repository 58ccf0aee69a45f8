"""torch's own context parallelism: its ring over SDPA, rotating by all-gather or all-to-all.

`dtensor`: a module made parallel as `parallelize_module` does it, whose inputs become DTensors;
their attention is the ring. `direct`: that ring without the DTensors, which cost the host time.
`context_parallel`, a third way in, replaces SDPA for the whole process and is the same ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.base import Layer, Mode, Peer, Setting, hybrid_mesh, require_even
from swiftfusion_xdit.cli.bench_config import Shape

EXPERIMENTAL = "torch.distributed.tensor.experimental._attention"


@dataclass(frozen=True)
class Kernel:
    """How SDPA and how the ring name one kernel, and what the ring hands to it."""

    sdpa: SDPBackend
    op: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)


KERNELS = {
    "cpu": Kernel(
        SDPBackend.FLASH_ATTENTION, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    ),
    "cudnn": Kernel(
        SDPBackend.CUDNN_ATTENTION,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
        {"attn_bias": None, "compute_log_sumexp": True},
    ),
    "sdpa_flash": Kernel(
        SDPBackend.FLASH_ATTENTION, torch.ops.aten._scaled_dot_product_flash_attention
    ),
}


class TorchContextParallel(Peer):
    name = "torch context parallel"
    package = "torch"
    module = EXPERIMENTAL

    def reason(self, setting: Setting) -> str | None:
        missing = super().reason(setting)
        return missing and f"this torch has no {EXPERIMENTAL}"

    def modes(self, setting: Setting) -> list[Mode]:
        backends = ("cudnn", "sdpa_flash") if setting.on_gpu else ("cpu",)
        dtensor_on_cpu = "DTensors take the ring for SDPA's GPU kernels only"
        return [
            Mode(
                f"{way} {method} {backend}",
                backend,
                backend,
                ring=setting.ranks,
                options=(way, method),
                reason=dtensor_on_cpu if way == "dtensor" and not setting.on_gpu else "",
            )
            for backend in backends
            for way in ("dtensor", "direct")
            for method in ("allgather", "alltoall")
        ]

    def layer(self, mode: Mode, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Layer:
        from torch.distributed.tensor.experimental import _attention

        require_even(shape, ranks=dist.get_world_size(), ulysses=1)
        mesh = hybrid_mesh(q.device.type, 1, mode.ring)["ring"]
        kernel = KERNELS[mode.kernel]
        # Sharding without a load balancer also tells the ring that there is none: a balanced ring
        # is for causal attention.
        unused = torch.zeros((1, 1, mesh.size()), device=q.device)
        _attention._context_parallel_shard(mesh, [unused], [2])
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        if "dtensor" in mode.options:
            module = _Attention(kernel.sdpa)
            _parallelize(module, mesh)
            return lambda: module(query, key, value).transpose(1, 2)
        group, ring = mesh.get_group(), _attention._templated_ring_attention

        def direct() -> Tensor:
            found = ring(group, 2, kernel.op, query, key, value, dropout_p=0.0, **kernel.arguments)
            return found[0].transpose(1, 2)

        return direct

    def activate(self, mode: Mode) -> None:
        from torch.distributed.tensor.experimental import _attention

        _attention.set_rotate_method(mode.options[-1])


class _Attention(nn.Module):
    """SDPA over ``[B, H, S, D]`` with one kernel."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self._kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(self._kernel):
            return F.scaled_dot_product_attention(q, k, v)


def _parallelize(module: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.experimental import _attention
    from torch.distributed.tensor.parallel import parallelize_module

    _attention._enable_context_parallel_dispatcher()
    kind = _attention._ContextParallel.AttentionType.SDPA
    parallelize_module(module, mesh, _attention._ContextParallel(seq_dim=2, attention_type=kind))
