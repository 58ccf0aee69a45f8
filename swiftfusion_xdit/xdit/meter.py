"""Bytes that xDiT's own collectives send from this rank during attention, per class of link.

Only for reports. USP itself is not changed: its calls are found through functions of its module
that it alone calls, and the collectives inside them through torch's dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from swiftfusion_xdit.topology import Link, Topology
from swiftfusion_xdit.xdit.patches import Patches

# Called by USP at the start of every call, and by nothing else.
CALL_MARK = "_validate_gqa_params"
# Everything that USP calls and that may communicate.
COMMUNICATING = (
    "_sdpa_all_to_all_single",
    "ring_attn",
    "fp8_comms_input_all_to_all",
    "fp8_comms_output_all_to_all",
    "revert_head_balance",
)
NAMESPACES = ("_c10d_functional", "c10d", "c10d_functional")
SILENT = frozenset({"wait_tensor", "_wrap_tensor_autograd"})


class CollectiveMeter(TorchDispatchMode):
    """Counts what this rank sends in functional collectives while it is entered.

    Args:
        topology: machines of the SP group's ranks.
        ranks: the global ranks of the SP group, in its order.
    """

    def __init__(self, topology: Topology, ranks: Sequence[int]) -> None:
        super().__init__()
        self.topology = topology
        self.index_of = {rank: i for i, rank in enumerate(ranks)}
        self.num_bytes = {Link.SAME_MACHINE: 0, Link.ACROSS_MACHINES: 0}
        self.unknown: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace in NAMESPACES:
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in SILENT:
            return
        if func.namespace == "_c10d_functional" and name == "all_to_all_single":
            tensor, _, splits, group = args
            row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
            self._send(group, [rows * row_bytes for rows in splits])
        elif func.namespace == "_c10d_functional" and name == "all_gather_into_tensor":
            tensor, size, group = args
            self._send(group, [tensor.nbytes] * size)
        else:
            self.unknown.add(f"{func.namespace}::{name}")

    def _send(self, group: Any, num_bytes: Sequence[int]) -> None:
        """``num_bytes[i]`` go to rank i of a process group (or of the group of that name)."""
        resolved = group if isinstance(group, dist.ProcessGroup) else _resolve_process_group(group)
        me = dist.get_rank()
        for peer, sent in zip(dist.get_process_group_ranks(resolved), num_bytes, strict=True):
            link = self.topology.link(self.index_of[me], self.index_of[peer])
            if link is not Link.SAME_RANK:
                self.num_bytes[link] += sent


def install(
    usp: ModuleType,
    meter: CollectiveMeter,
    *,
    on_call: Callable[[], None],
    on_event: Callable[[str, str, Callable[[], Any]], Any],
    patches: Patches,
) -> None:
    """Meter the calls of ``usp.USP``.

    Args:
        on_call: called at the start of every USP call.
        on_event: called as ``on_event(stream, name, body)`` around a part of a call; returns what
            ``body`` returns.
    """
    mark = getattr(usp, CALL_MARK)

    @functools.wraps(mark)
    def marked(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            on_call()
        return mark(*args, **kwargs)

    patches.set(usp, CALL_MARK, marked)
    for name in COMMUNICATING:
        if hasattr(usp, name):
            patches.set(usp, name, _metered(getattr(usp, name), name, meter, on_event))


def _metered(
    original: Callable[..., Any],
    name: str,
    meter: CollectiveMeter,
    on_event: Callable[[str, str, Callable[[], Any]], Any],
) -> Callable[..., Any]:
    @functools.wraps(original)
    def metered(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            meter.unknown.add("compiled attention")
            return original(*args, **kwargs)
        with meter:
            return on_event(
                "compute" if name == "ring_attn" else "comm",
                name.strip("_"),
                lambda: original(*args, **kwargs),
            )

    return metered
