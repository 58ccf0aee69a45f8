"""The one launch that makes all fused calls of a program."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from swiftfusion_xdit.attention.fused import CHUNK_BITS, RemoteKeys
from swiftfusion_xdit.comm.stream import StreamBuffer
from swiftfusion_xdit.device_runtime.calls import Output
from swiftfusion_xdit.plan import FUSED_TILE_ROWS, own_rows_in_tile
from swiftfusion_xdit.runtime import Layer
from swiftfusion_xdit.schedule.steps import Block, Release, Wait

if TYPE_CHECKING:
    from swiftfusion_xdit.device_runtime import DeviceRunner

# The kernel gives up after the watchdog, which reports more, has had its time.
DEADLINE_GRACE_S = 60.0


class FusedCall:
    """Attends this rank's queries with its own keys and with those that peers put meanwhile."""

    def __init__(
        self, runner: DeviceRunner, parity: int, stream: int, *, behind_puts: bool
    ) -> None:
        """``behind_puts``: whether the launch before it on the stream is that of a PutCall."""
        self.stream = stream
        self.outputs: list[Output] = []
        self._backend = runner.backend
        plan, rank, buffer = runner.plan, runner.rank, runner.buffer
        assert isinstance(buffer, StreamBuffer)
        layout, (call, *_) = plan.layouts[rank], runner.program.fused_calls
        k, v = (layout.array(tensor, parity) for tensor in ("k", "v"))
        self._arrivals = call.keys[-2::-1]
        received = sum(plan.shape.key_lengths[chunk] for chunk in self._arrivals)
        self.own_rows = own_rows_in_tile(received)
        base, device = buffer.address(rank), buffer.local.device
        given_back = self._given_back(runner, buffer, parity)
        self._remote = RemoteKeys(
            k=base + k.offset_bytes,
            v=base + v.offset_bytes,
            num_rows=k.shape[1],
            num_keys=sum(plan.shape.key_lengths),
            begins=torch.tensor(self._begins(runner), dtype=torch.int32, device=device),
            flags=torch.tensor(
                self._flags(runner, buffer, parity), dtype=torch.int64, device=device
            ),
            counter=torch.zeros(1, dtype=torch.int32, device=device),
            clears=torch.tensor(given_back[0], dtype=torch.int64, device=device),
            frees=torch.tensor(given_back[1], dtype=torch.int64, device=device),
            note=runner.notes.stream_lane_address(-1),
            deadline_ns=int((runner.timeout_s + DEADLINE_GRACE_S) * 1e9),
            behind_puts=behind_puts,
        )

    def _begins(self, runner: DeviceRunner) -> list[int]:
        """Of each tile, from the first row on: the chunks that a walk from the end meets there."""
        lengths = runner.plan.shape.key_lengths
        stop = sum(lengths[chunk] for chunk in self._arrivals)
        entries = [0] * (-(-stop // FUSED_TILE_ROWS))
        for number, chunk in enumerate(self._arrivals):
            tile = (stop - 1) // FUSED_TILE_ROWS
            entries[tile] = (entries[tile] or number) + (1 << CHUNK_BITS)
            stop -= lengths[chunk]
        return entries

    def _flags(
        self, runner: DeviceRunner, buffer: StreamBuffer, parity: int
    ) -> list[list[tuple[int, int]]]:
        """Of each chunk and head: where its flag is, and its name."""
        plan, rank, table = runner.plan, runner.rank, []
        for chunk in self._arrivals:
            row: list[tuple[int, int]] = []
            for call in runner.program.fused_calls:
                block = plan.message_block(rank, Block("k", chunk, call.heads))
                wait = Wait(call.stage, call.stream, block, chunk)
                flag = runner.awaited_flag(wait, parity).index
                entry = (buffer.flag_address(flag, rank), buffer.wait_token(flag))
                row += [entry] * len(plan.heads("k", call.heads))
            table.append(row)
        return table

    def _given_back(
        self, runner: DeviceRunner, buffer: StreamBuffer, parity: int
    ) -> tuple[list[int], list[int]]:
        """The FULL flags of all messages, and the FREE flag of all that a peer has put."""
        plan, rank = runner.plan, runner.rank
        clears, frees = [], []
        for step in runner.program.steps:
            if isinstance(step, Release):
                if plan.message_block(rank, step.block) == step.block:
                    full = plan.full_flag(rank, step.block, parity)
                    clears.append(buffer.flag_address(full, rank))
                if plan.return_block(step.peer, rank, step.block) == step.block:
                    free = plan.free_flag(step.peer, rank, step.block, parity)
                    frees.append(buffer.flag_address(free, step.peer))
        return clears, frees

    def prepare(self, layer: Layer) -> None:
        """Run once, off the record, without a flag: loads the kernel."""
        remote, nothing = self._remote, self._remote.clears[:0]
        begins = torch.zeros_like(remote.begins)
        alone = replace(remote, begins=begins, clears=nothing, frees=nothing, behind_puts=False)
        self._run(layer, alone)

    def repeats(self, scale: float) -> bool:
        """As of an AttendCall."""
        return True

    def __call__(self, layer: Layer) -> None:
        self._run(layer, self._remote)

    def _run(self, layer: Layer, remote: RemoteKeys) -> None:
        q, k, v = layer.inputs.values()
        own = slice(self.own_rows, None)
        self._backend.fused(q, k[:, own], v[:, own], layer.scale, layer.out, remote)
