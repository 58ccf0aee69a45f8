"""cache-dit's context parallelism: Ulysses, ring and both, asynchronous and 8-bit all-to-alls.

It is driven below its model patches, which need a diffusers transformer: the dispatcher with its
configuration, and for asynchronous Ulysses the all-to-alls in the order in which the patched
attention of FLUX starts them. What that overlaps with in a model, projections and norms, is no part
of a layer here. Its backends are imported without being put into diffusers' registry, which would
change the other peer.
"""

from __future__ import annotations

import importlib
from typing import Any

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

FP8_ERROR = 0.1  # q, v and out travel as 8-bit floats


class CacheDit(Peer):
    name = "cache-dit"
    package = "cache-dit"
    module = "cache_dit"

    def modes(self, setting: Setting) -> list[Mode]:
        if not setting.on_gpu:
            return self._modes_of("cpu", "native", setting)
        return [
            *self._modes_of("cudnn", "_sdpa_cudnn", setting),
            *self._modes_of("sdpa_auto", "native", setting),
        ]

    def _modes_of(self, backend: str, kernel: str, setting: Setting) -> list[Mode]:
        modes = []
        for ulysses, ring in setting.hybrids():
            reason = ""
            if ring > 1 and (kernel != "native" or not setting.on_gpu):
                reason = f"ring needs a log-sum-exp, which its {kernel} lacks here"
            name = f"ulysses {ulysses} ring {ring} {kernel}"
            modes.append(Mode(name, backend, kernel, ulysses, ring, reason=reason))
        for words in (("async",), ("anything",), ("float8",), ("async", "float8")):
            fp8 = "float8" in words
            reason = "its 8-bit kernels need a GPU" if fp8 and not setting.on_gpu else ""
            modes.append(
                Mode(
                    f"ulysses {' '.join(words)} {kernel}",
                    backend,
                    kernel,
                    ulysses=setting.ranks,
                    options=tuple(f"ulysses_{word}" for word in words),
                    reason=reason,
                    graph_reason=HOST_SYNC if "anything" in words else "",
                    max_error=FP8_ERROR if fp8 else None,
                )
            )
        return modes

    def layer(self, mode: Mode, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Layer:
        from cache_dit.attention import _dispatch_attention_fn as attend
        from cache_dit.distributed.core import _All2AllComm, _ContextParallelConfig

        for name in ("native", "cudnn"):
            importlib.import_module(f"cache_dit.attention.backends.{name}")  # registers itself
        ranks = dist.get_world_size()
        if "ulysses_anything" not in mode.options:
            # Heads that do not divide it pads, rows it does not.
            require_even(shape, ranks=ranks, ulysses=1)
        elif shape.rows < ranks:
            raise NotRunnable(f"{shape.rows} rows for {ranks} ranks")
        switches: dict[str, Any] = dict.fromkeys(mode.options, True)
        config = _ContextParallelConfig(
            ulysses_degree=mode.ulysses, ring_degree=mode.ring, **switches
        )
        mesh = hybrid_mesh(q.device.type, mode.ulysses, mode.ring)
        config.setup(dist.get_rank(), ranks, q.device, mesh)
        if "ulysses_async" not in mode.options:
            return lambda: attend(q, k, v, backend=mode.kernel, cp_config=config)

        def overlapped() -> Tensor:
            comm = _All2AllComm(config)
            arriving = comm.send_v(v), comm.send_q(q), comm.send_k(k)
            value, query, key = (each.wait() for each in arriving)
            out = attend(query, key, value, backend=mode.kernel, cp_config=None)
            return comm.send_o(out).wait()

        return overlapped
