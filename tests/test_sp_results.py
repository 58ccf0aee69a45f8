"""What attention returns belongs to the caller, is the same bits every time, and can be watched."""

from __future__ import annotations

import json

import pytest
import torch

from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.sequence_parallel import SequenceParallel
from tests.sp_cases import Case

CASE = Case(Mesh(2, 1, 2), (5, 3, 4, 6), (5, 3, 4, 6), machines=2, num_heads=5, num_kv_heads=5)


def keep_results(rank: int, world_size: int, schedule: str) -> str:
    """Results of earlier layers must survive later ones, and writing to one must harm nobody."""
    with SequenceParallel(mesh=CASE.mesh, machines=2, schedule=schedule) as sp:
        q, k, v = (
            whole.split(CASE.query_lengths, dim=1)[rank].clone() for whole in CASE.full_inputs()
        )
        kept = [sp.attention(q, k, v) for _ in range(5)]
        copies = [out.clone() for out in kept]
        kept[0].fill_(torch.nan)
        again = sp.attention(q, k, v)
        q.fill_(torch.nan)  # inputs may be reused as soon as the call returns
        for out, copy in zip([*kept[1:], again], [*copies[1:], copies[0]], strict=True):
            if not torch.equal(out, copy):
                return "a result changed"
    return "kept" if torch.equal(again, copies[0]) else "bits differ between calls"


@pytest.mark.parametrize("schedule", ["torus", "pipelined"])
def test_results_are_the_callers_and_deterministic(rank_pool, schedule: str) -> None:
    assert rank_pool(4).run(keep_results, schedule) == ["kept"] * 4


def watch(rank: int, world_size: int) -> dict:
    q, k, v = (whole.split(CASE.query_lengths, dim=1)[rank] for whole in CASE.full_inputs())
    with SequenceParallel(machines=2, mesh=CASE.mesh) as sp:
        before = sp.describe()
        sp.attention(q, k, v)
        with sp.record() as events:
            sp.attention(q, k, v)
        sp.attention(q, k, v)
        assert sp.mesh is not None
        return {
            "before": before,
            "after": sp.describe(),
            "mesh": sp.mesh.as_dict(),
            "events": [(e.rank, e.stream, e.name, e.start_us, e.end_us) for e in events],
            "stats": json.loads(json.dumps(sp.stats())),
        }


def test_recording_and_description(rank_pool) -> None:
    for rank, seen in enumerate(rank_pool(4).run(watch)):
        assert "no call yet" in seen["before"]
        assert "mesh torus=2,ulysses=1,ring=2, schedule torus" in seen["after"]
        assert seen["mesh"] == {"torus": 2, "ulysses": 1, "ring": 2}
        assert seen["stats"]["attention_calls"] == 3
        names = [name for _, _, name, _, _ in seen["events"]]
        assert sum(name.startswith("attend") for name in names) == 5
        streams = {stream for _, stream, *_ in seen["events"]}
        assert streams == {"compute", "compute2", "ring", "torus"}
        times = [time for *_, start, end in seen["events"] for time in (start, end)]
        assert times == sorted(times) and {event[0] for event in seen["events"]} == {rank}
