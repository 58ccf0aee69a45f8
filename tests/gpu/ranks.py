"""Ranks for tests on GPUs: a process each, on a GPU each where there are enough.

Ranks that share a GPU take turns on it: what they compute must be the same, how fast says nothing.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST_SECONDS = 300.0  # then a rank shows where it is, and all end
# The smallest group, and all GPUs (of an odd number, all but one).
RANKS = sorted({2, max(2, torch.cuda.device_count() // 2 * 2)})


def run_on_gpus(num_ranks: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """``[fn(rank, num_ranks, *args) for every rank]``, each in a fresh process."""
    share = torch.cuda.device_count() < num_ranks
    if share:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_start, args=(num_ranks, share, directory, fn, args), nprocs=num_ranks)
        results = [Path(directory) / f"result{rank}" for rank in range(num_ranks)]
        return [torch.load(result, weights_only=False) for result in results]


def _start(
    rank: int,
    num_ranks: int,
    share: bool,
    directory: str,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    device = 0 if share else rank
    os.environ["LOCAL_RANK"] = str(device)  # xDiT goes by it
    torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if share else "nccl",  # NCCL refuses ranks that share a GPU
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=num_ranks,
    )
    result = fn(rank, num_ranks, *args)
    torch.save(result, f"{directory}/result{rank}")
    torch.cuda.synchronize()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
