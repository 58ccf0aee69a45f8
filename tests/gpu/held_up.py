"""One of two ranks, of which rank 1 dies or stops in the middle of a layer; run as a process.

python -m tests.gpu.held_up TRANSPORT RANK DIRECTORY (kill|stop) TIMEOUT_S
"""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist

from swiftfusion_xdit.comm import create_communicator
from swiftfusion_xdit.comm.stream import StreamCommunicator
from swiftfusion_xdit.topology import Topology
from tests.gpu.comm_cases import Exchange

VICTIM = 1
TURNS_BEFORE = 6


def main(transport: str, rank: int, directory: str, how: str, timeout_s: float) -> None:
    torch.cuda.set_device(rank)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{directory}/store", 2), rank=rank, world_size=2
    )
    comm = create_communicator(
        transport, dist.group.WORLD, Topology.split(2, 1), timeout_s=timeout_s, device="cuda"
    )
    assert isinstance(comm, StreamCommunicator)
    exchange = Exchange(comm, contiguous=False)
    for turn in range(TURNS_BEFORE):
        exchange.run(turn % 2, context=f"attention call {turn + 1}")
    torch.cuda.synchronize()
    dist.barrier()
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    exchange.run(TURNS_BEFORE % 2, context=f"attention call {TURNS_BEFORE + 1}")
    torch.cuda.synchronize()  # where a rank sits when its peer does not come
    print("finished", flush=True)
    os._exit(0)


if __name__ == "__main__":
    name, own_rank, folder, what, limit = sys.argv[1:]
    main(name, int(own_rank), folder, what, float(limit))
