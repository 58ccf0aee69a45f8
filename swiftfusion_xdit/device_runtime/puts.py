"""The puts of a layer with fused calls as one launch, for short layers.

Copy engines cost nothing of a GPU's units, but some microseconds for each copy and each flag, and
ranks that put to one peer after another meet at the same peer. Where there is little to put to
several peers a kernel of few blocks is done sooner: it loads each row once and stores it to all of
them. And the host has one thing to launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from swiftfusion_xdit.comm.stream import StreamBuffer
from swiftfusion_xdit.device_runtime.calls import Output
from swiftfusion_xdit.native.structs import MAX_PUT_ITEMS, MAX_PUT_PEERS, PutArgs, PutItem
from swiftfusion_xdit.plan import Plan
from swiftfusion_xdit.runtime import Layer
from swiftfusion_xdit.schedule.messages import messages
from swiftfusion_xdit.schedule.steps import Block

if TYPE_CHECKING:
    from swiftfusion_xdit.device_runtime import DeviceRunner

NUM_BLOCKS = 12  # of the kernel, a unit each until all is put (results/puts_by_kernel.md)


class PutCall:
    """Puts a rank's own keys and values to all peers, and tells each of them by its flags.

    It does not wait: the FREE flags of the slots are waited for and cleared before.
    """

    outputs: tuple[Output, ...] = ()

    def __init__(
        self,
        runner: DeviceRunner,
        parity: int,
        strides: Mapping[str, tuple[int, ...]],
        stream: int,
    ) -> None:
        """``strides``: of each input, in elements."""
        self.stream = stream
        self._runner, self._parity = runner, parity
        self._sources: list[tuple[str, int]] = []  # of each item: the input, the offset in it
        self._counters = torch.zeros(
            MAX_PUT_ITEMS, dtype=torch.int32, device=runner.buffer.local.device
        )
        blocks = _to_all_peers(runner.plan, runner.rank)
        assert len({peers for _, peers, _ in blocks}) == 1, blocks
        self._args = PutArgs(
            counters=self._counters.data_ptr(),
            num_items=len(blocks),
            num_peers=len(blocks[0][1]),
            num_blocks=NUM_BLOCKS,
        )
        for idx, (block, peers, is_last) in enumerate(blocks):
            stride = strides[block.tensor]
            self._args.items[idx] = self._item(block, peers, stride, is_last=is_last)
            heads = runner.plan.heads(block.tensor, block.heads)
            self._sources.append((block.tensor, heads.start * stride[2] * self._itemsize))

    def _item(
        self, block: Block, peers: tuple[int, ...], stride: tuple[int, ...], *, is_last: bool
    ) -> PutItem:
        plan, buffer, parity = self._runner.plan, self._runner.buffer, self._parity
        assert isinstance(buffer, StreamBuffer)
        item = PutItem()
        for idx, peer in enumerate(peers):
            slot = plan.layouts[peer].slot(block, parity)
            item.dst[idx] = buffer.address(peer) + slot.offset_bytes
            item.dst_stride[:] = [step * self._itemsize for step in slot.stride[:3]]
            item.batch, item.rows, item.heads, head_dim = slot.shape
            if is_last:
                flag = plan.full_flag(peer, block, parity)
                item.flag[idx] = buffer.flag_address(flag, peer)
        item.src_stride[:] = [step * self._itemsize for step in stride[:3]]
        item.head_bytes = head_dim * self._itemsize
        return item

    @property
    def _itemsize(self) -> int:
        return self._runner.plan.shape.itemsize

    def prepare(self, layer: Layer) -> None:
        """Nothing: the library has loaded its kernels."""

    def repeats(self, scale: float) -> bool:
        """As of an AttendCall."""
        return True

    def __call__(self, layer: Layer) -> None:
        for item, (tensor, offset) in zip(self._args.items, self._sources, strict=False):
            item.src = layer.inputs[tensor].data_ptr() + offset
        stream = torch.cuda.current_stream(layer.out.device).cuda_stream
        self._runner.native.put(self._args, stream=stream)


def can_put_by_kernel(plan: Plan, rank: int) -> bool:
    """Whether a kernel puts what this rank puts in a layer. Ranks need not agree.

    Every peer must get the same blocks, into slots of the same strides.
    """
    if not plan.puts_by_kernel:
        return False
    blocks = _to_all_peers(plan, rank)
    first = 0 if plan.shape.batch > 1 else 1
    for block, peers, _ in blocks:
        strides = {plan.layouts[peer].slot(block, 0).stride[first:] for peer in peers}
        if len(peers) > MAX_PUT_PEERS or len(strides) > 1:
            return False
    return len(blocks) <= MAX_PUT_ITEMS


def _to_all_peers(plan: Plan, rank: int) -> list[tuple[Block, tuple[int, ...], bool]]:
    """Of each block that a rank puts, in order: who gets it, and whether it ends a message."""
    peers: dict[Block, list[int]] = {}
    last: set[Block] = set()
    for puts in messages(plan.schedule.programs[rank]):
        for put in puts:
            peers.setdefault(put.block, []).append(put.peer)
        last.add(puts[-1].block)
    return [(block, tuple(each), block in last) for block, each in peers.items()]
