"""yunchang's LongContextAttention, all degrees, with the kernels that need no flash-attn 2.

Its other layers only have a reason here: `UlyssesAttention` hands torch's kernels no group, so that
they run a ring over all ranks after the all-to-all; `AsyncLongContextAttention` cannot be told
which kernel to take.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.base import Layer, Mode, Peer, Setting, hybrid_mesh, require_even
from swiftfusion_xdit.cli.bench_config import Shape

# A local kernel and yunchang's AttnType that runs the same one.
ON_GPU = {"cudnn": "torch_cudnn", "sdpa_flash": "torch_flash", "sdpa_efficient": "torch_efficient"}
IF_ASKED = {"fa2": "fa", "fa3": "fa3"}
WITHOUT_LSE = ("torch_math", "torch_cudnn")
NOT_RUN = {
    "UlyssesAttention": "with torch's kernels it attends to the keys of other heads; at ring 1, "
    "LongContextAttention is the same exchange",
    "AsyncLongContextAttention": "takes flash-attn 2 only",
}


class Yunchang(Peer):
    name = "yunchang"
    package = "yunchang"
    module = "yunchang"

    def modes(self, setting: Setting) -> list[Mode]:
        kernels = {"cpu": "torch_math"}
        if setting.on_gpu:
            asked = {k: v for k, v in IF_ASKED.items() if k in setting.backends}
            kernels = {**ON_GPU, **asked}
        modes = []
        for backend, kernel in kernels.items():
            for ulysses, ring in setting.hybrids():
                reason = ""
                if ring > 1 and kernel in WITHOUT_LSE:
                    reason = f"ring needs a log-sum-exp, and its {kernel} returns zeros for one"
                name = f"ulysses {ulysses} ring {ring} {kernel}"
                modes.append(Mode(name, backend, kernel, ulysses, ring, reason=reason))
        for name, reason in NOT_RUN.items():
            modes.append(Mode(name, reason=reason))
        return modes

    def layer(self, mode: Mode, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Layer:
        from yunchang import LongContextAttention
        from yunchang.kernels import AttnType

        require_even(shape, ranks=dist.get_world_size(), ulysses=mode.ulysses)
        mesh = hybrid_mesh(q.device.type, mode.ulysses, mode.ring)
        with _Groups(mesh):
            attention = LongContextAttention(attn_type=AttnType.from_string(mode.kernel))
        return lambda: attention(q, k, v)


class _Groups:
    """The groups that yunchang's layers take when they are made; xDiT has others there."""

    def __init__(self, mesh: Any) -> None:
        self._groups = {"ULYSSES_PG": mesh.get_group("ulysses"), "RING_PG": mesh.get_group("ring")}

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()

    def _swap(self) -> None:
        from yunchang.globals import PROCESS_GROUP

        for name, group in self._groups.items():
            self._groups[name] = getattr(PROCESS_GROUP, name)
            setattr(PROCESS_GROUP, name, group)
