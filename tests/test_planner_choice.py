"""The planner takes the fastest candidate within the limits, and says why the others lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.mesh import Mesh, paper_mesh
from swiftfusion_xdit.plan import Plan
from swiftfusion_xdit.planner import SIMULATED_WITHIN, WORTHWHILE, Choice, layer_shape, plan
from swiftfusion_xdit.planner.bounds import even_shape, lower_bound_us
from swiftfusion_xdit.planner.candidates import KNOWN_SCHEDULES, Candidate
from swiftfusion_xdit.planner.memory import attention_shape
from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.simulate.hardware import Cluster, Link
from swiftfusion_xdit.simulate.layer import simulate_layer
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import nccl, one_sided

CASES = (
    ("p4de", 2, 2, 9216, 24, 128),
    ("p4de", 3, 4, 37376, 24, 128),
    ("p5", 2, 4, 17776, 48, 64),
    ("l40-pcie", 2, 4, 4608, 10, 128),
    ("h200-8", 1, 8, 16896, 24, 128),
    ("h200-2", 1, 2, 4608, 24, 128),
    ("h200-2", 1, 2, 6240, 48, 64),  # its tiles are ragged
    ("p5", 2, 1, 37376, 24, 128),
)


def make(name: str, machines: int, gpus: int, rows: int, heads: int, dim: int):
    cluster = preset(name, num_machines=machines, gpus_per_machine=gpus)
    shape = LayerShape.even(cluster.num_ranks, sequence=rows, num_heads=heads, head_dim=dim)
    return cluster, shape


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quick_search_is_within_what_is_worthwhile_of_the_best(case: tuple) -> None:
    cluster, shape = make(*case)
    quick, full = plan(cluster, shape), plan(cluster, shape, effort=None)
    best_us = min(p.layer_us for _, p in predictions(full))
    margin = 1 + (SIMULATED_WITHIN if full.schedule == "fused" else 0.001)
    assert full.prediction.layer_us <= best_us * margin, case
    margin = max(margin, 1 / (1 - WORTHWHILE))
    assert quick.prediction.layer_us <= best_us * margin, (case, quick.describe())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_candidate_beats_its_lower_bound(case: tuple) -> None:
    cluster, shape = make(*case)
    for candidate, found in predictions(plan(cluster, shape, effort=None)):
        even = even_shape(shape, candidate.mesh)
        bound_us = lower_bound_us(candidate, even, cluster, one_sided())
        assert bound_us <= found.layer_us * (1 + 1e-9), (case, str(candidate))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_prediction_is_the_simulation_of_that_candidate(case: tuple) -> None:
    cluster, shape = make(*case)
    choice = plan(cluster, shape)
    even = even_shape(shape, choice.mesh)
    layer = simulate_layer(
        choice.schedule,
        choice.mesh,
        even,
        cluster,
        inside=one_sided(),
        across=one_sided(),
        groups_per_rank=choice.groups_per_rank,
    )
    found = choice.prediction
    assert (found.layer_us, found.exposed_us) == (layer.total_us, layer.exposed_us), case
    full = Plan(
        attention_shape(even),
        build(choice.schedule, choice.mesh, groups_per_rank=choice.groups_per_rank),
    )
    assert found.symmetric_bytes == full.symmetric_bytes, case


def test_every_other_candidate_has_a_reason_and_the_order_is_by_time() -> None:
    cluster, shape = make(*CASES[1])
    choice = plan(cluster, shape, effort=None)
    assert all(outcome.reason for outcome in choice.others)
    times = [o.prediction.layer_us for o in choice.others if o.prediction is not None]
    assert times == sorted(times)
    assert "slower" in choice.others[0].reason or "as fast" in choice.others[0].reason
    text = choice.describe()
    assert "\n" not in text and str(choice.mesh) in text and choice.schedule in text


def test_slow_links_make_the_mesh_that_sends_less_win() -> None:
    cluster, shape = make("p4de", 4, 8, 37376, 24, 128)
    choice = plan(cluster, shape, strategies=("usp", "torus"), effort=None)
    assert choice.candidate.strategy == "torus" and choice.mesh.torus == 4
    usp = next(o for o in choice.others if o.candidate == Candidate("usp", Mesh(1, 8, 4), "usp"))
    assert usp.prediction is not None
    # The paper's formulas: 2 (N-1) / N of a machine's rows against 4 (N-1) / N^2.
    assert usp.prediction.bytes_across == 2 * choice.prediction.bytes_across


def test_uneven_heads_and_rows_are_planned_by_the_busiest_rank() -> None:
    cluster = preset("p5", num_machines=2, gpus_per_machine=4)
    shape = LayerShape(1, (100, 90, 0, 120, 100, 100, 100, 101), (64,) * 8, 7, 7, 128)
    choice = plan(cluster, shape)
    assert choice.mesh.size == 8 and choice.mesh.num_head_groups <= 7
    even = even_shape(shape, Mesh(torus=2, ulysses=2, ring=2))
    assert even.num_heads == 8 and even.query_lengths == (89,) * 8


def test_grouped_query_heads_stay_compact() -> None:
    shape = LayerShape(1, (64,) * 4, (64,) * 4, 12, 3, 128)
    even = even_shape(shape, Mesh(torus=2, ulysses=1, ring=2))
    assert (even.num_heads, even.num_kv_heads) == (12, 4)  # 6 query heads touch up to 3 of them
    cluster = preset("p5", num_machines=2, gpus_per_machine=2)
    assert plan(cluster, shape).mesh.size == 4


def test_a_memory_limit_excludes_what_needs_more() -> None:
    cluster, shape = make(*CASES[4])
    free = plan(cluster, shape, effort=None)
    sizes = sorted({p.symmetric_bytes for _, p in predictions(free)})
    choice = plan(cluster, shape, effort=None, memory_limit_bytes=sizes[0])
    assert choice.prediction.symmetric_bytes == sizes[0] < free.prediction.symmetric_bytes
    assert any("MiB of symmetric memory" in outcome.reason for outcome in choice.others)
    with pytest.raises(ValueError, match="no mesh and schedule fit"):
        plan(cluster, shape, memory_limit_bytes=1)


def test_without_a_log_sum_exp_only_pipelined_runs() -> None:
    cluster, shape = make(*CASES[1])
    choice = plan(cluster, shape, has_lse=False, effort=None)
    assert {c.schedule for c, _ in predictions(choice)} == {"pipelined"}
    with pytest.raises(ValueError, match="log-sum-exp"):
        plan(cluster, shape, has_lse=False, schedules=("torus",))


def test_the_papers_rule_is_a_policy() -> None:
    for case in CASES[:3]:
        cluster, shape = make(*case)
        choice = plan(cluster, shape, policy="paper")
        assert choice.mesh == paper_mesh(cluster.topology, shape.num_heads), case
        assert choice.schedule == "torus"
        assert plan(cluster, shape).prediction.layer_us <= choice.prediction.layer_us * 1.001, case


def meshes_of(machines: int, gpus: int) -> set[Mesh]:
    choice = plan(*make("p5", machines, gpus, 4608, 24, 128), effort=None)
    return {candidate.mesh for candidate, _ in predictions(choice)}


def test_a_ring_crosses_machines_only_where_that_sends_no_more() -> None:
    assert meshes_of(2, 1) == {Mesh(torus=2), Mesh(ring=2)}
    assert {mesh.torus for mesh in meshes_of(2, 2)} == {2}
    assert meshes_of(3, 1) == {Mesh(torus=3)}
    choice = plan(*make("p5", 2, 1, 4608, 24, 128), effort=None)
    bytes_across = {c.mesh: p.bytes_across for c, p in predictions(choice)}
    # 2304 rows of 24 heads of 128 elements of 2 bytes, as keys and values; or half of q, k, v, o.
    assert bytes_across == {Mesh(torus=2): 28311552, Mesh(ring=2): 28311552}


@pytest.mark.parametrize("gb_per_s", [1.0, 2.0])
def test_a_ring_across_machines_is_charged_their_link(gb_per_s: float) -> None:
    cluster, shape = make("p5", 2, 1, 4608, 24, 128)
    cluster = replace(cluster, across=Link(gb_per_s, 50.0), across_gb_per_s_per_gpu=None)
    for transport in (one_sided(), nccl()):
        rate = gb_per_s * 1e3 * transport.across.fraction
        choice = plan(cluster, shape, "ring=2", transport=transport, effort=None)
        for candidate, found in predictions(choice):
            bound_us = lower_bound_us(candidate, shape, cluster, transport)
            assert 28311552 / rate <= bound_us <= found.layer_us, str(candidate)


def test_no_fused_call_reaches_over_machines() -> None:
    cluster, shape = make("h200-8", 2, 1, 4608, 24, 128)
    for degrees in (None, "ring=2"):
        choice = plan(cluster, shape, degrees, schedules=KNOWN_SCHEDULES, effort=None)
        assert {c.schedule for c, _ in predictions(choice)} == {"torus", "folded", "pipelined"} - (
            {"folded"} if degrees else set()
        )
    with pytest.raises(ValueError, match="fused works inside one machine, got 2 machines"):
        plan(cluster, shape, schedules=("fused",))


def test_more_machines_than_heads_still_have_a_plan() -> None:
    cluster, shape = make("p5", 4, 1, 1024, 2, 128)
    assert plan(cluster, shape).mesh.num_head_groups <= 2


def predictions(choice: Choice):
    yield choice.candidate, choice.prediction
    for outcome in choice.others:
        if outcome.prediction is not None:
            yield outcome.candidate, outcome.prediction


def test_planning_is_a_function_of_its_arguments() -> None:
    from swiftfusion_xdit.planner import _answer

    cluster, shape = make(*CASES[2])
    first = plan(cluster, shape)
    assert plan(Cluster(**vars(cluster)), shape) is first  # equal arguments, one answer
    _answer.cache_clear()
    assert plan(cluster, shape) == first


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("machines", [1, 2])
def test_tiny_layers_have_a_plan(rows: int, machines: int) -> None:
    cluster = preset("p5", num_machines=machines, gpus_per_machine=1)
    shape = LayerShape.even(machines, sequence=rows, num_heads=4, head_dim=64)
    assert plan(cluster, shape).mesh.size == machines


def test_a_runtime_shape_is_planned_as_it_is() -> None:
    _, shape = make(*CASES[3])
    assert layer_shape(attention_shape(shape)) == shape


@pytest.mark.parametrize("rows", [75600, 119056, 300000])
def test_one_attention_call_is_tried_though_others_come_close_to_its_bound(rows: int) -> None:
    assert plan(*make("h200-2", 1, 2, rows, 24, 128)).schedule == "fused"


def test_one_attention_call_wins_what_the_simulator_cannot_tell() -> None:
    choice = plan(*make("h200-2", 1, 2, 4608, 8, 64), effort=None)
    assert choice.schedule == "fused"
    faster = [other for other in choice.others if "faster, less than" in other.reason]
    assert faster, "another schedule is simulated to be a little faster here"
    for other in faster:
        assert other.prediction is not None
        least_us = choice.prediction.layer_us / (1 + SIMULATED_WITHIN)
        assert least_us <= other.prediction.layer_us < choice.prediction.layer_us
