"""The ``nccl`` transport: the same schedule over sends and receives, wherever NCCL runs.

A put is a send, and its receiver posts the receive: both ends know all transfers of a layer
beforehand (``bind``) and enter them in one agreed order of batches, on a side stream. A batch is
one group of NCCL sends and receives, entered once all of this rank's puts in it have been called.
The order is such that no rank waits in a circle (``schedule/rounds.py``).

What two ranks on two machines send each other goes as one all-gather a batch instead. Over TCP
xDiT's ring, which gathers, takes less time than its all-to-all of as many bytes
(benchmarks/results/tcp_2_hosts_2_gpus.json).

Flags do not exist here. FULL is the end of the receive, which the waiting stream is put behind.
FREE needs no message: the receiver itself begins the receive, after its own earlier layers.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from swiftfusion_xdit.comm import cuda, hosts, segment
from swiftfusion_xdit.comm.base import Flag, SymmetricBuffer, Transfer
from swiftfusion_xdit.comm.stream import StreamBuffer, StreamCommunicator, memory_bytes
from swiftfusion_xdit.comm.watchdog import end_process
from swiftfusion_xdit.region import Region
from swiftfusion_xdit.topology import Link, Topology

logger = logging.getLogger(__name__)

HIGH_PRIORITY = -1  # of a stream
MEASURED_BYTES = 32 * 2**20
MEASURED_TURNS = 3
TORCH_TIMEOUT_S = 600.0  # of its NCCL groups
NO_GROUP = "nccl: no group of its own could be made; transfers may wait until attention ends"


@dataclass
class _Batch:
    """This rank's part of one batch, in the order that all ranks share."""

    transfers: list[Transfer] = field(default_factory=list)
    num_sends: int = 0


class _Transfers:
    """What this rank sends and receives in a layer of one parity."""

    def __init__(self, transfers: Sequence[Transfer], rank: int) -> None:
        batches: dict[int, _Batch] = defaultdict(_Batch)
        self.sends: dict[tuple[int, Region], Transfer] = {}
        self.full_flags: set[int] = set()  # of what is received
        for transfer in transfers:
            if rank not in (transfer.src, transfer.dst) or not transfer.region.num_bytes:
                continue
            batch = batches[transfer.batch]
            batch.transfers.append(transfer)
            if transfer.src == rank:
                batch.num_sends += 1
                self.sends[transfer.dst, transfer.region] = transfer
            else:
                self.full_flags.add(transfer.full_flag)
        self.batches = [batches[number] for number in sorted(batches)]
        self.position = {number: i for i, number in enumerate(sorted(batches))}


class _Layer:
    """How far the layer in hand has come."""

    def __init__(self, transfers: _Transfers) -> None:
        self.transfers = transfers
        self.next_batch = 0
        self.sources: list[dict[Transfer, tuple[Tensor, torch.cuda.Event]]] = [
            {} for _ in transfers.batches
        ]
        self.arrived: dict[int, torch.cuda.Event] = {}  # by FULL flag

    def ready(self) -> _Batch | None:
        """The batch to enter next, if all its sends are there."""
        if self.next_batch == len(self.transfers.batches):
            return None
        batch = self.transfers.batches[self.next_batch]
        return batch if len(self.sources[self.next_batch]) == batch.num_sends else None


def exchange(group: dist.ProcessGroup, out: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Both ranks of a group of two give each other contiguous tensors, as one all-gather.

    What one brings must have the bytes of what the other takes, tensor by tensor. On GPUs it is
    enqueued on the current stream.
    """
    device = (*out, *into)[0].device
    num_bytes = [sum(tensor.nbytes for tensor in tensors) for tensors in (out, into)]
    # Alike on both ranks: what one brings the other takes.
    parts = torch.empty(2, max(num_bytes), dtype=torch.uint8, device=device)
    mine = torch.empty_like(parts[0])
    if out:
        torch.cat([_as_bytes(tensor) for tensor in out], out=mine[: num_bytes[0]])
    dist.all_gather_into_tensor(parts.view(-1), mine, group=group)
    theirs = parts[1 - dist.get_rank(group)]
    start = 0
    for tensor in into:
        _as_bytes(tensor).copy_(theirs[start : start + tensor.nbytes])
        start += tensor.nbytes


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


class NcclCommunicator(StreamCommunicator):
    """Ranks of ``group``, each with a GPU, on any hosts; collective to build.

    Transfers go through an NCCL group made here, whose kernels come before others that wait for
    multiprocessors: were a transfer to queue behind the attention call that is to hide it, nothing
    would overlap. Where such a group cannot be made (see ``_can_make_group``), they go through
    ``group``. ``bind`` comes before the first layer, every call of a layer between ``begin_layer``
    and ``end_layer``, in the order of the program.

    Raises:
        ValueError: on every rank: a rank has no GPU, two share one, or no NCCL group can be had.
    """

    transport = "nccl"
    two_sided = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        topology: Topology,
        *,
        timeout_s: float,
        on_failure: Callable[[str], None] = end_process,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        cuda.check_devices(group, transport=self.transport, need_peers=False)
        own = _own_group(group, timeout_s)
        if own is None and "nccl" not in dist.get_backend(group):
            raise ValueError(
                "transport nccl needs a group of NCCL, or one of ranks that can make one by "
                f"themselves; got a group of {dist.get_backend(group)}"
            )
        super().__init__(
            group,
            topology,
            timeout_s=timeout_s,
            device=torch.device("cuda", torch.cuda.current_device()),
            processes=hosts.watch_processes(group),
            board=hosts.make_board(group),
            on_failure=on_failure,
        )
        self._side = torch.cuda.Stream(self.device, priority=HIGH_PRIORITY)
        self._transfers: dict[int, list[_Transfers]] = {}  # by buffer number, then parity
        self._layer: _Layer | None = None
        self._global_ranks = [dist.get_global_rank(group, peer) for peer in range(self.size)]
        if own is None and self.rank == 0:
            logger.warning(NO_GROUP)
        self._nccl = group if own is None else own
        self._is_pair = self.size == 2 and self._links[1 - self.rank] is Link.ACROSS_MACHINES
        # Connects now: a first use inside a graph capture would be too late.
        dist.all_reduce(torch.zeros(1, device=self.device), group=self._nccl)
        torch.cuda.synchronize(self.device)

    def measure_across(self) -> float | None:
        topology = self.topology
        if topology.num_machines == 1 or not topology.is_even:
            return None
        step = self.size // topology.num_machines  # to the counterpart on the next machine
        onward, back = (self.rank + step) % self.size, (self.rank - step) % self.size
        out = torch.zeros(MEASURED_BYTES, dtype=torch.uint8, device=self.device)
        into = torch.empty_like(out)
        events = []
        for _ in range(1 + MEASURED_TURNS):  # the first one connects
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            if self._is_pair:
                exchange(self._nccl, [out], [into])
            else:
                self._send_and_receive([(onward, out)], [(back, into)])
            end.record()
            events.append((begin, end))
        self.layer_context = "measuring the way to the next machine"
        with self.heartbeat.watched():
            torch.cuda.synchronize(self.device)
        fastest_ms = min(begin.elapsed_time(end) for begin, end in events[1:])
        return MEASURED_BYTES / fastest_ms / 1e6

    def allocate(self, num_bytes: int, *, num_flags: int) -> StreamBuffer:
        self._check_open()
        segment.check_sizes(segment.exchange(self._group, [num_bytes, num_flags]))
        with torch.inference_mode(False):
            memory = torch.zeros(
                memory_bytes(num_bytes, num_flags), dtype=torch.uint8, device=self.device
            )
        torch.cuda.synchronize(self.device)
        addresses = [0] * self.size
        addresses[self.rank] = memory.data_ptr()
        buffer = StreamBuffer(
            memory, addresses, rank=self.rank, num_bytes=num_bytes, num_flags=num_flags
        )
        self._buffers.append(buffer)
        return buffer

    def free(self, buffer: SymmetricBuffer) -> None:
        self._check_open()
        if buffer not in self._buffers:
            raise ValueError(f"the buffer must be one of this communicator's, got {buffer}")
        assert isinstance(buffer, StreamBuffer)
        torch.cuda.synchronize(self.device)
        self._transfers.pop(buffer.number, None)
        buffer.close()
        self._buffers = [other for other in self._buffers if other is not buffer]

    def bind(self, buffer: SymmetricBuffer, transfers: Sequence[Transfer]) -> None:
        assert isinstance(buffer, StreamBuffer)
        num_parities = max((t.parity for t in transfers), default=0) + 1
        self._transfers[buffer.number] = [
            _Transfers([t for t in transfers if t.parity == parity], self.rank)
            for parity in range(num_parities)
        ]

    def begin_layer(self, buffer: SymmetricBuffer, context: str, *, parity: int = 0) -> None:
        assert isinstance(buffer, StreamBuffer)
        if buffer.number not in self._transfers:
            raise RuntimeError(
                "transport nccl needs bind(buffer, transfers) before the first layer"
            )
        super().begin_layer(buffer, context, parity=parity)
        # Receives overwrite slots that earlier layers have read on this stream.
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        self._layer = _Layer(self._transfers[buffer.number][parity])
        self._enter_batches(buffer)

    def end_layer(self, buffer: SymmetricBuffer) -> None:
        layer = self._open_layer()
        assert layer.next_batch == len(layer.transfers.batches), (
            f"rank {self.rank} ends a layer with puts missing in batch {layer.next_batch}"
        )
        self._layer = None
        torch.cuda.current_stream(self.device).wait_stream(self._side)
        super().end_layer(buffer)

    def put(self, src: Tensor, buffer: SymmetricBuffer, region: Region, peer: int) -> None:
        assert isinstance(buffer, StreamBuffer)
        self._check_source(src, region)
        self._check_peer(peer)
        if not region.num_bytes:
            return
        layer = self._open_layer()
        transfer = layer.transfers.sends.get((peer, region))
        if transfer is None:
            raise ValueError(f"no transfer to rank {peer} into {region} was bound for this layer")
        packed = src.detach().contiguous()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        # The side stream reads it later; the allocator must know.
        packed.record_stream(self._side)
        position = layer.transfers.position[transfer.batch]
        layer.sources[position][transfer] = (packed, event)
        self.counters.add(self._links[peer], region.num_bytes)
        self._enter_batches(buffer)

    def _enter_batches(self, buffer: StreamBuffer) -> None:
        layer = self._open_layer()
        while (batch := layer.ready()) is not None:
            self._enter(layer, batch, buffer)
            layer.next_batch += 1

    def _enter(self, layer: _Layer, batch: _Batch, buffer: StreamBuffer) -> None:
        sources = layer.sources[layer.next_batch]
        sent: list[tuple[int, Tensor]] = []
        received: list[tuple[Transfer, Tensor, Tensor]] = []  # (transfer, slot, where it comes in)
        with torch.cuda.stream(self._side), torch.no_grad():
            for transfer in batch.transfers:
                if transfer.src == self.rank:
                    packed, event = sources[transfer]
                    self._side.wait_event(event)
                    sent.append((transfer.dst, packed))
                else:
                    slot = buffer.view(transfer.region)
                    packed = (
                        slot
                        if slot.is_contiguous()
                        else torch.empty_like(slot, memory_format=torch.contiguous_format)
                    )
                    received.append((transfer, slot, packed))
            into = [(transfer.src, packed) for transfer, _, packed in received]
            if self._is_pair:
                exchange(self._nccl, [packed for _, packed in sent], [packed for _, packed in into])
            else:
                self._send_and_receive(sent, into)
            for _, slot, packed in received:
                if packed is not slot:
                    slot.copy_(packed)
            event = torch.cuda.Event()
            event.record(self._side)
        for transfer, _, _ in received:
            layer.arrived[transfer.full_flag] = event
        sources.clear()

    def _send_and_receive(
        self, sent: Sequence[tuple[int, Tensor]], into: Sequence[tuple[int, Tensor]]
    ) -> None:
        """As one group of NCCL; of each tensor the other end."""
        operations = [
            dist.P2POp(call, tensor, self._global_ranks[peer], self._nccl)
            for call, tensors in ((dist.isend, sent), (dist.irecv, into))
            for peer, tensor in tensors
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()  # puts the current stream behind the transfers; the host goes on

    def wait(
        self,
        buffer: SymmetricBuffer,
        flag: Flag,
        peer: int,
        *,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        """Put the current stream behind the receive that ``flag``, a FULL flag, stands for."""
        assert isinstance(buffer, StreamBuffer)
        self._check_peer(peer)
        layer = self._open_layer()
        if flag.index not in layer.transfers.full_flags:
            return  # FREE, or a slot without rows
        event = layer.arrived.pop(flag.index, None)
        assert event is not None, (
            f"rank {self.rank} waits for {flag.name} before its own puts of that batch"
        )
        if flag.index not in buffer.flag_names:
            buffer.flag_names[flag.index] = (flag, peer)
        stream = torch.cuda.current_stream(self.device)
        lane = self.heartbeat.stream_lane_address(stream.cuda_stream)
        self._driver.note32(stream.cuda_stream, lane, buffer.wait_token(flag.index))
        stream.wait_event(event)
        self._driver.note32(stream.cuda_stream, lane, 0)

    def signal(self, buffer: SymmetricBuffer, flag_index: int, peer: int) -> None:
        """Nothing to do: see above."""

    def preset(self, buffer: SymmetricBuffer, flag_index: int) -> None:
        """Nothing to do: see above."""

    def clear(self, buffer: SymmetricBuffer, flag_index: int) -> None:
        """Nothing to do: see above."""

    def get(self, buffer: SymmetricBuffer, region: Region, peer: int) -> Tensor:
        raise NotImplementedError("transport nccl has no get: its peers would have to take part")

    def _open_layer(self) -> _Layer:
        if self._layer is None:
            raise RuntimeError("transport nccl moves data between begin_layer and end_layer only")
        return self._layer


_own_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _own_group(group: dist.ProcessGroup, timeout_s: float) -> dist.ProcessGroup | None:
    """An NCCL group of the same ranks whose kernels go before others; None if there can be none.

    Collective the first time. All transports over ``group`` share it, and it stays until all groups
    are destroyed: taking an NCCL communicator down needs every rank, and waits for each graph that
    it was captured in to go.
    """
    known = dist.distributed_c10d._world.pg_map
    if _own_groups.get(group) not in known:
        _own_groups.pop(group, None)
        if not _can_make_group(group):
            return None
        # The watchdog reports first, and names the step.
        timeout = timedelta(seconds=max(TORCH_TIMEOUT_S, 2 * timeout_s + 60))
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = timeout  # as torch does; it warns if the two differ
        own = dist.new_group(
            dist.get_process_group_ranks(group),
            backend="nccl",
            use_local_synchronization=True,
            pg_options=options,
            timeout=timeout,
        )
        assert own is not None
        _own_groups[group] = own
    return _own_groups[group]


def _can_make_group(group: dist.ProcessGroup) -> bool:
    """Whether an NCCL group of these ranks can be made by these ranks alone. Collective.

    Where the default group is bound to a device, torch splits communicators from its own, and every
    rank of the default group has to take part. And torch names such a group after the number of
    groups that a rank knows, which must be the same on all.
    """
    default = dist.group.WORLD
    assert default is not None
    num_known = segment.exchange(group, [len(dist.distributed_c10d._world.pg_names)])
    is_bound = default.bound_device_id is not None
    needs_all = is_bound and group.size() != default.size()
    return not needs_all and all(each == num_known[0] for each in num_known)
