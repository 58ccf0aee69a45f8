"""What both ends of a transfer derive from a plan, and how a rank keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swiftfusion_xdit.comm import Transfer
from swiftfusion_xdit.comm.nccl import _Layer, _Transfers
from swiftfusion_xdit.comm.nvshmem import _is_contiguous, loaded_libraries
from swiftfusion_xdit.exchange import transfers
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import NUM_PARITIES, AttentionShape, make_plan
from swiftfusion_xdit.region import Region
from swiftfusion_xdit.schedule.steps import Put
from swiftfusion_xdit.topology import Topology

MESH = Mesh(torus=2, ulysses=1, ring=2)


def some_transfers(lengths: tuple[int, ...] = (5, 3, 7, 2)) -> tuple[Transfer, ...]:
    shape = AttentionShape(1, lengths, lengths, 4, 2, 8, torch.bfloat16)
    return transfers(make_plan(shape, Topology.split(4, 2), mesh=MESH))


def test_every_put_of_both_parities_once() -> None:
    shape = AttentionShape(1, (5, 3, 7, 2), (5, 3, 7, 2), 4, 2, 8, torch.bfloat16)
    plan = make_plan(shape, Topology.split(4, 2), mesh=MESH)
    num_puts = sum(isinstance(s, Put) for p in plan.schedule.programs for s in p.steps)
    found = transfers(plan)
    assert len(found) == NUM_PARITIES * num_puts
    for rank in range(4):
        full = [t.full_flag for t in found if t.dst == rank]
        free = [t.free_flag for t in found if t.src == rank]
        assert len({*full, *free}) == len(full) + len(free), "a flag stands for one transfer"
        ends = [(t.region, t.dst) for t in found if t.src == rank]
        assert len(set(ends)) == len(ends), "a put is known by its region"


@pytest.mark.parametrize(("whole_rounds", "expected"), [(False, 7), (True, 2)])
def test_a_rank_enters_as_many_batches_as_its_plan_says(whole_rounds: bool, expected: int) -> None:
    shape = AttentionShape(1, (5, 3, 7, 2), (5, 3, 7, 2), 4, 4, 8, torch.bfloat16)
    topology = Topology.split(4, 4)
    plan = make_plan(shape, topology, schedule="torus", whole_rounds=whole_rounds)
    found = [t for t in transfers(plan) if t.parity == 0]
    for rank in range(4):
        mine = _Transfers(found, rank)
        assert len(mine.batches) == expected
        own = [t for t in found if t.src == rank]
        assert [t for b in mine.batches for t in b.transfers if t.src == rank] == own


def test_a_batch_is_entered_when_its_sends_are_there_and_in_order() -> None:
    found = [t for t in some_transfers() if t.parity == 0]
    layer = _Layer(_Transfers(found, 0))
    own = [t for t in found if t.src == 0]
    assert layer.ready() is None
    entered = []
    for transfer in reversed(own):  # later batches first: they wait for the earlier ones
        position = layer.transfers.position[transfer.batch]
        layer.sources[position][transfer] = (torch.empty(0), None)  # type: ignore[assignment]
        while (batch := layer.ready()) is not None:
            entered.append(batch)
            layer.next_batch += 1
    assert entered == layer.transfers.batches
    assert [t for b in entered for t in b.transfers if t.src == 0] == own


def test_blocks_without_rows_are_not_sent() -> None:
    found = [t for t in some_transfers((5, 0, 7, 2)) if t.parity == 0]
    empty = {t for t in found if not t.region.num_bytes}
    assert empty, "rank 1 brings no rows"
    for rank in range(4):
        mine = _Transfers(found, rank)
        assert not empty & {t for batch in mine.batches for t in batch.transfers}
        assert not mine.full_flags & {t.full_flag for t in empty if t.dst == rank}


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((1, 4, 3, 8), (999, 24, 8, 1), True),
        ((2, 4, 3, 8), (96, 24, 8, 1), True),
        ((2, 4, 3, 8), (999, 24, 8, 1), False),
        ((1, 4, 3, 8), (999, 64, 8, 1), False),
    ],
)
def test_contiguous_regions(
    shape: tuple[int, ...], stride: tuple[int, ...], expected: bool
) -> None:
    assert _is_contiguous(Region(0, shape, stride, torch.bfloat16)) is expected


def test_nvshmem_libraries_in_the_process(tmp_path: Path) -> None:
    line = "7f00-7f01 r-xp 00000000 08:01 42                         "
    maps = tmp_path / "maps"
    maps.write_text(
        f"{line}/a/libnvshmem_host.so.3\n{line}/a/libnvshmem_host.so.3\n"
        f"{line}/usr/lib/libc.so.6\n7f02-7f03 rw-p 00000000 00:00 0\n"
    )
    assert loaded_libraries(str(maps)) == ["/a/libnvshmem_host.so.3"]
