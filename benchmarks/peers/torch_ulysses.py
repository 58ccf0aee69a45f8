"""Ulysses with nothing but torch, around this package's local kernels.

`all_to_all`: one all-to-all of q, k and v together, one of the outputs, by the group's backend.
`push` and `pull`: the same exchange through torch's symmetric memory, each as kernels that write
to, or read from, the peers' memory and lay out heads and rows on the way. Multicast is not used.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.base import Layer, Mode, Peer, Setting, require_even
from swiftfusion_xdit.attention import Backend, attend, select_backend
from swiftfusion_xdit.cli.bench_config import Shape

SYMMETRIC = ("push", "pull")


class TorchUlysses(Peer):
    name = "torch ulysses"
    package = "torch"
    module = "torch"

    def modes(self, setting: Setting) -> list[Mode]:
        reason = "" if setting.on_gpu else "torch's symmetric memory needs GPUs"
        return [
            Mode(
                f"{exchange} {backend}",
                backend,
                backend,
                ulysses=setting.ranks,
                options=(exchange,),
                reason=reason if exchange in SYMMETRIC else "",
            )
            for backend in setting.backends
            for exchange in ("all_to_all", *SYMMETRIC)
        ]

    def layer(self, mode: Mode, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Layer:
        ranks = dist.get_world_size()
        require_even(shape, ranks=ranks, ulysses=ranks)
        backend = select_backend(mode.backend, q.device)
        (exchange,) = mode.options
        if exchange == "all_to_all":
            return _AllToAll(backend, q, k, v)
        return _Symmetric(backend, q, k, v, push=exchange == "push")


class _AllToAll:
    """One layer by two all-to-alls."""

    def __init__(self, backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._backend = backend
        self._inputs = (q, k, v)
        self._ranks = dist.get_world_size()

    def __call__(self) -> Tensor:
        q, ranks = self._inputs[0], self._ranks
        batch, rows, heads, dim = q.shape
        split = (batch, rows, ranks, heads // ranks, dim)
        # [ranks, 3, B, S / ranks, H / ranks, D]
        sent = torch.stack([x.view(split) for x in self._inputs]).permute(3, 0, 1, 2, 4, 5)
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        # [3, B, S, H / ranks, D]
        whole = received.permute(1, 2, 0, 3, 4, 5).reshape(3, batch, -1, heads // ranks, dim)
        out = attend(*whole, scale=1 / math.sqrt(dim), backend=self._backend)[0]
        sent = out.reshape(batch, ranks, rows, heads // ranks, dim).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        # [ranks, B, S / ranks, H / ranks, D] -> [B, S / ranks, H, D]
        return received.permute(1, 2, 0, 3, 4).reshape(batch, rows, heads, dim)


class _Symmetric:
    """One layer through buffers that every rank has at the same place, two barriers a layer.

    A barrier orders both sides: a rank passes the second one of a layer after its peers have
    attended, so the next layer may overwrite what they attended to; and it passes the first one
    after its peers were done with the previous layer's outputs.
    """

    def __init__(self, backend: Backend, q: Tensor, k: Tensor, v: Tensor, *, push: bool) -> None:
        # No object for multicast either, which a rendezvous would otherwise make.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._backend = backend
        self._inputs = (q, k, v)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._pushes = push
        batch, rows, heads, dim = q.shape
        self._scale = 1 / math.sqrt(dim)
        own, whole = (batch, rows, heads, dim), (batch, rows * self._ranks, heads // self._ranks)
        # Of a push, peers write where this rank reads; of a pull, they read where it writes.
        qkv, out = ((3, *whole, dim), own) if push else ((3, *own), (*whole, dim))
        self._handles: list[Any] = []
        self._qkv, self._out = self._buffers(qkv, q), self._buffers(out, q)
        if not push:
            self._whole = torch.empty((3, *whole, dim), dtype=q.dtype, device=q.device)
            self._result = torch.empty_like(q)

    def _buffers(self, dims: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """Every rank's buffer of these dims, as this rank addresses it."""
        import torch.distributed._symmetric_memory as symmetric

        own = symmetric.empty(dims, dtype=like.dtype, device=like.device)
        group = dist.group.WORLD
        assert group is not None
        handle = symmetric.rendezvous(own, group)
        self._handles.append(handle)
        return [
            own if peer == self._rank else handle.get_remote_tensor(peer, dims, like.dtype)
            for peer in range(self._ranks)
        ]

    def _barrier(self) -> None:
        self._handles[0].barrier()

    def __call__(self) -> Tensor:
        return self._push() if self._pushes else self._pull()

    def _push(self) -> Tensor:
        for peer in self._order():
            for idx, x in enumerate(self._inputs):
                theirs = x.tensor_split(self._ranks, dim=2)[peer]
                self._rows_of(self._qkv[peer][idx], self._rank).copy_(theirs)
        self._barrier()
        out = self._attend(self._qkv[self._rank])
        for peer in self._order():
            mine = self._out[peer].tensor_split(self._ranks, dim=2)[self._rank]
            mine.copy_(self._rows_of(out, peer))
        self._barrier()
        return self._out[self._rank]

    def _pull(self) -> Tensor:
        for idx, x in enumerate(self._inputs):
            self._qkv[self._rank][idx].copy_(x)
        self._barrier()
        for peer in self._order():
            mine = self._qkv[peer].tensor_split(self._ranks, dim=3)[self._rank]
            start, rows = peer * mine.shape[2], mine.shape[2]
            self._whole[:, :, start : start + rows].copy_(mine)
        self._out[self._rank].copy_(self._attend(self._whole))
        self._barrier()
        for peer in self._order():
            heads = self._result.tensor_split(self._ranks, dim=2)[peer]
            heads.copy_(self._rows_of(self._out[peer], self._rank))
        return self._result

    def _attend(self, qkv: Tensor) -> Tensor:
        return attend(*qkv, scale=self._scale, backend=self._backend)[0]

    def _rows_of(self, x: Tensor, rank: int) -> Tensor:
        return x.tensor_split(self._ranks, dim=1)[rank]

    def _order(self) -> list[int]:
        """The peers, the next one first, so that no rank is everybody's first."""
        return [(self._rank + step) % self._ranks for step in range(1, self._ranks + 1)]
