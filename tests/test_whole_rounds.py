"""Where links are slow, transfers go in whole rounds, and a ring joins two machines of one GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from swiftfusion_xdit.autoplan import AutoPlanner
from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.mesh import Mesh
from swiftfusion_xdit.plan import AttentionShape
from swiftfusion_xdit.planner import Choice, plan
from swiftfusion_xdit.planner.bounds import DOMINANT, lower_bound_us, transfers_dominate
from swiftfusion_xdit.planner.candidates import Candidate
from swiftfusion_xdit.sequence_parallel import SequenceParallel
from swiftfusion_xdit.simulate.hardware import Cluster, Link
from swiftfusion_xdit.simulate.layer import simulate_layer
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import nccl, one_sided
from tests.distributed import RankPool

WAN_480, WAN_720, FLUX_3072 = (32760, 40), (75600, 40), (37376, 24)  # rows and heads
FLUX_1024 = (4608, 24)
TCP, FAST = 2.9, 50.0  # GB/s of a machine


def hosts(machines: int, gb_per_s: float, *, gpus: int = 1) -> Cluster:
    cluster = preset("p5", num_machines=machines, gpus_per_machine=gpus)
    return replace(cluster, across=Link(gb_per_s, 50.0), across_gb_per_s_per_gpu=None)


def layer(machines: int, model: tuple[int, int]) -> LayerShape:
    rows, heads = model
    return LayerShape.even(machines, sequence=rows, num_heads=heads, head_dim=128)


@pytest.mark.parametrize("model", [FLUX_3072, WAN_480, WAN_720])
def test_whole_rounds_are_for_slow_links_and_for_transports_whose_receivers_join(
    model: tuple[int, int],
) -> None:
    shape = layer(4, model)
    slow = plan(hosts(4, TCP), shape, transport=nccl())
    assert slow.candidate.whole_rounds and str(slow.candidate).endswith(", in whole rounds")
    assert not plan(hosts(4, FAST), shape, transport=nccl()).candidate.whole_rounds
    assert not plan(hosts(4, TCP), shape, transport=one_sided()).candidate.whole_rounds
    one_machine = replace(preset("p5", num_machines=1, gpus_per_machine=4), inside=Link(TCP, 5.0))
    assert not plan(one_machine, shape, transport=nccl()).candidate.whole_rounds


def test_transfers_dominate_from_a_multiple_of_attention_on() -> None:
    shape = layer(4, WAN_480)
    candidate = Candidate("torus", Mesh(torus=4), "pipelined")
    attention_us = plan(hosts(4, FAST), shape, transport=nccl()).prediction.floor_us
    sent = 4 * 3 * shape.query_lengths[0] * 10 * 128 * 2  # bytes: q, k, v and o, ten heads each
    limit = sent / (DOMINANT * attention_us) / 1e3 / nccl().across.fraction
    for share, expected in ((0.99, True), (1.01, False)):
        found = transfers_dominate(candidate, shape, hosts(4, share * limit), nccl())
        assert found is expected


def test_a_prediction_is_the_simulation_of_whole_rounds() -> None:
    cluster, shape = hosts(4, TCP), layer(4, WAN_480)
    choice = plan(cluster, shape, schedules=("torus",), transport=nccl())
    times = [
        simulate_layer(
            "torus",
            choice.mesh,
            shape,
            cluster,
            inside=nccl(),
            across=nccl(),
            whole_rounds=whole_rounds,
        )
        for whole_rounds in (True, False)
    ]
    assert choice.prediction.layer_us == times[0].total_us != times[1].total_us


@pytest.mark.parametrize(("machines", "gpus"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("gb_per_s", [TCP, FAST])
def test_no_candidate_beats_its_lower_bound(machines: int, gpus: int, gb_per_s: float) -> None:
    cluster, shape = hosts(machines, gb_per_s, gpus=gpus), layer(machines * gpus, FLUX_3072)
    choice = plan(cluster, shape, transport=nccl(), effort=None)
    for outcome in choice.others:
        if outcome.prediction is not None:
            bound_us = lower_bound_us(outcome.candidate, shape, cluster, nccl())
            assert bound_us <= outcome.prediction.layer_us * (1 + 1e-9), str(outcome.candidate)


@pytest.mark.parametrize("model", [FLUX_1024, FLUX_3072, WAN_480, WAN_720])
@pytest.mark.parametrize("effort", [2000, None])
@pytest.mark.parametrize("gb_per_s", [0.9, TCP])
def test_two_hosts_over_tcp_take_a_ring(
    model: tuple[int, int], effort: int | None, gb_per_s: float
) -> None:
    choice = plan(hosts(2, gb_per_s), layer(2, model), transport=nccl(), effort=effort)
    assert (choice.mesh, choice.schedule) == (Mesh(ring=2), "torus")
    assert choice.candidate.groups_per_rank == 4
    torus = best_of(choice, Mesh(torus=2))
    assert choice.prediction.layer_us < 1.06 * torus  # they are as fast as the simulator can tell


def test_head_groups_are_not_for_rings_whose_links_keep_up() -> None:
    cluster, shape = hosts(2, 400.0), layer(2, WAN_720)
    choice = plan(cluster, shape, "ring=2", schedules=("torus",), transport=nccl())
    assert choice.candidate == Candidate("torus", Mesh(ring=2), "torus")
    assert plan(hosts(2, TCP), shape, "ring=2", transport=nccl()).candidate.groups_per_rank == 4


def test_more_keys_than_queries_are_not_worth_a_ring() -> None:
    many_keys = LayerShape(1, (2048,) * 2, (16384,) * 2, 40, 40, 128)
    assert plan(hosts(2, TCP), many_keys, transport=nccl()).mesh == Mesh(torus=2)


def best_of(choice: Choice, mesh: Mesh) -> float:
    found = [o.prediction for o in choice.others if o.candidate.mesh == mesh]
    return min(prediction.layer_us for prediction in found if prediction is not None)


def choose(
    rank: int, size: int, gb_per_s: float, groups: int | None = None
) -> tuple[str, str, int, bool]:
    """What a rank on a GPU would run; here its device and its planner's cluster are made up."""
    lengths = (37376 // size,) * size
    shape = AttentionShape(1, lengths, lengths, 24, 24, 128, torch.bfloat16)
    schedule = "auto" if groups is None else "torus"
    with SequenceParallel(machines=size, schedule=schedule, groups=groups) as sp:
        planner = object.__new__(AutoPlanner)
        planner._agreement, planner.cluster = sp._agreement, hosts(size, gb_per_s)
        planner.transport = nccl()
        sp._planner, sp.device = planner, torch.device("cuda")
        sp._comm.two_sided = True
        sp._num_units = lambda: 132  # type: ignore[method-assign]
        chosen = sp._choose_plan(shape)
        name, number = chosen.schedule.name, chosen.schedule.groups_per_rank
        return str(chosen.mesh), name, number, chosen.whole_rounds


def test_ranks_run_what_was_planned(rank_pool: Callable[[int], RankPool]) -> None:
    ring = ("torus=1,ulysses=1,ring=2", "torus", 4, False)
    assert rank_pool(2).run(choose, TCP) == [ring] * 2
    found = rank_pool(4).run(choose, TCP)
    assert found[0][0] == "torus=4,ulysses=1,ring=1" and found[0][3] and len(set(found)) == 1
    assert not rank_pool(4).run(choose, FAST)[0][3]


def test_forced_head_groups_get_a_mesh_that_has_them(
    rank_pool: Callable[[int], RankPool],
) -> None:
    by_itself, forced = rank_pool(4).run(choose, TCP), rank_pool(4).run(choose, TCP, 3)
    assert by_itself[0][0].startswith("torus=4,")
    assert {(mesh.split(",")[0], name, groups) for mesh, name, groups, _ in forced} == {
        ("torus=1", "torus", 3)
    }
