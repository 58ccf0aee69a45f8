"""The cuda transport: whole messages in order, graphs, several groups, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import Region, create_communicator
from swiftfusion_xdit.comm.cuda import CudaCommunicator
from swiftfusion_xdit.topology import Topology
from tests.gpu.comm_cases import Exchange, many_turns, replays
from tests.gpu.holding_up import hold_up
from tests.gpu.ranks import run_on_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


def make(group: dist.ProcessGroup, topology: Topology) -> CudaCommunicator:
    return CudaCommunicator(group, topology, timeout_s=60)


@pytest.mark.parametrize("contiguous", [False, True])
def test_no_message_is_lost_torn_or_overwritten(contiguous: bool) -> None:
    run_on_gpus(2, many_turns, make, 500, contiguous)


def test_a_captured_exchange_replays_exactly() -> None:
    run_on_gpus(2, replays, make, 300)


def several_groups(rank: int, size: int) -> None:
    topology = Topology.split(size, 1)
    gloo = dist.new_group(list(range(size)), backend="gloo")
    comms = [
        create_communicator("auto", group, topology, timeout_s=60, device="cuda")
        for group in (dist.group.WORLD, gloo)
    ]
    alone = dist.new_group([rank], use_local_synchronization=True, backend="gloo")
    single = create_communicator("cuda", alone, Topology.split(1, 1), timeout_s=60, device="cuda")
    assert all(isinstance(comm, CudaCommunicator) for comm in comms)
    exchanges = [Exchange(comm, contiguous=False) for comm in comms]  # type: ignore[arg-type]
    streams = [torch.cuda.Stream() for _ in comms]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for turn in range(50):
        for exchange, stream in zip(exchanges, streams, strict=True):
            with torch.cuda.stream(stream):
                exchange.run(turn % 2)
    for exchange in exchanges:
        exchange.check(50)
    buffer = single.allocate(1 << 20, num_flags=1)
    assert not buffer.local.any()
    for comm in (*comms, single):
        comm.post((rank, 5))
    dist.barrier()
    assert comms[0].peek(1 - rank) == (1 - rank, 5)
    dist.barrier()
    for comm in (*comms, single):
        comm.close()


def test_groups_work_side_by_side() -> None:
    run_on_gpus(2, several_groups)


def get_and_refuse(rank: int, size: int) -> None:
    with make(dist.group.WORLD, Topology.split(size, 1)) as comm:
        buffer = comm.allocate(1 << 20, num_flags=2)
        region = Region(256, (3, 5), (7, 1), torch.float32)
        own = region.view(buffer.local)
        own.copy_(torch.arange(15, device="cuda").view(3, 5) + 100 * rank)
        torch.cuda.synchronize()
        dist.barrier()
        got = comm.get(buffer, region, 1 - rank)
        assert torch.equal(got.cpu(), torch.arange(15.0).view(3, 5) + 100 * (1 - rank))
        expanded = torch.tensor([float(rank)], device="cuda").expand(3, 5)
        dist.barrier()
        comm.put(expanded, buffer, region, 1 - rank)
        torch.cuda.synchronize()
        dist.barrier()
        assert torch.equal(own.cpu(), torch.full((3, 5), float(1 - rank)))
        with pytest.raises(ValueError, match="src must have the region's shape and dtype"):
            comm.put(torch.zeros(2, 5, device="cuda"), buffer, region, 1 - rank)
        with pytest.raises(ValueError, match="src must be on this rank's"):
            comm.put(torch.zeros(3, 5), buffer, region, 1 - rank)
        with pytest.raises(ValueError, match="region must end within the buffer"):
            far = Region(1 << 20, (4,), (1,), torch.float32)
            comm.put(torch.zeros(4, device="cuda"), buffer, far, 1 - rank)
        with pytest.raises(ValueError, match=r"flag index must be in \[0, 2\)"):
            comm.signal(buffer, 2, 1 - rank)
        with pytest.raises(ValueError, match=r"peer must be a rank in \[0, 2\)"):
            comm.signal(buffer, 0, 2)
        with pytest.raises(ValueError, match="num_bytes must be the same on every rank"):
            comm.allocate(1024 * (rank + 1), num_flags=0)
        with pytest.raises(OSError, match="cannot allocate symmetric GPU memory"):
            comm.allocate(1 << 46, num_flags=0)
        comm.free(buffer)
        with pytest.raises(RuntimeError, match="closed"):
            comm.signal(buffer, 0, 1 - rank)
    with pytest.raises(RuntimeError, match="closed"):
        comm.allocate(1, num_flags=0)


def test_get_and_what_is_refused() -> None:
    run_on_gpus(2, get_and_refuse)


def come_and_go(rank: int, size: int) -> None:
    with make(dist.group.WORLD, Topology.split(size, 1)) as comm:
        num_bytes = 64 << 20
        available = []
        for _ in range(12):
            buffer = comm.allocate(num_bytes, num_flags=8)
            comm.free(buffer)
            torch.cuda.synchronize()
            dist.barrier()
            available.append(torch.cuda.mem_get_info()[0])
        lost = available[1] - available[-1]
        assert lost < num_bytes, f"{lost} bytes lost over 10 buffers of {num_bytes}"


def test_memory_comes_back() -> None:
    run_on_gpus(2, come_and_go)


def share_a_gpu(rank: int, size: int) -> str:
    gloo = dist.new_group(list(range(size)), backend="gloo")
    torch.cuda.set_device(0)
    with pytest.raises(ValueError) as info:
        CudaCommunicator(gloo, Topology.split(size, 1), timeout_s=60)
    return str(info.value)


def test_ranks_on_one_gpu_are_named() -> None:
    for message in run_on_gpus(2, share_a_gpu):
        assert "needs a GPU of its own for every rank; ranks 0 and 1 share one" in message


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_rank_that_does_not_come_is_reported(how: str, tmp_path: Path) -> None:
    hold_up("cuda", how, tmp_path, timeout_s=600 if how == "kill" else 4)
