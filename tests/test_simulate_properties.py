"""Whatever is simulated: streams keep their order, links their capacity, data comes before use."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from itertools import pairwise

import pytest

from swiftfusion_xdit.schedule import build
from swiftfusion_xdit.simulate.engine import Op
from swiftfusion_xdit.simulate.fabric import Fabric
from swiftfusion_xdit.simulate.layer import LayerTime
from tests.simulate_cases import Case, make_cluster, random_case

SEEDS = range(80)
NUM_LAYERS = 4  # two of each parity: slots are written again
ROUNDING = 1e-6


@cache
def _simulate(seed: int) -> tuple[Case, LayerTime]:
    case = random_case(seed)
    return case, case.simulate(num_layers=NUM_LAYERS)


@pytest.mark.parametrize("seed", SEEDS)
def test_streams_keep_the_order_of_their_program(seed: int) -> None:
    case, layer = _simulate(seed)
    schedule = build(case.schedule, case.mesh, groups_per_rank=case.groups_per_rank)
    ranks = {op.rank for op in layer.graph.ops}
    for program in schedule.programs:
        if program.rank not in ranks:
            continue
        for stream in ("compute", "ring", "torus"):
            names = [str(step) for step in program.steps if step.stream == stream]
            known = set(names)
            done = [
                op
                for op in layer.graph.ops
                if op.rank == program.rank and op.stream == stream and op.name in known
            ]
            assert [op.name for op in done] == NUM_LAYERS * names, f"{seed=} {case}"
            for earlier, later in pairwise(done):
                assert later.start_us >= earlier.end_us - ROUNDING, f"{seed=} {case}\n{later}"


@pytest.mark.parametrize("seed", SEEDS)
def test_links_carry_no_more_than_they_can_and_all_that_is_sent(seed: int) -> None:
    case, layer = _simulate(seed)
    fabric = Fabric(
        make_cluster(case.mesh),
        inside=case.transport,
        across=case.transport,
        symmetric=layer.symmetric,
    )
    changes: dict[object, list[tuple[float, float]]] = defaultdict(list)
    for op in layer.graph.ops:
        carried = sum((end - begin) * rate for begin, end, rate in op.moved)
        assert carried == pytest.approx(op.num_bytes, rel=1e-6, abs=1e-3), f"{seed=} {case}\n{op}"
        for begin, end, rate in op.moved:
            for link in op.links:
                changes[link] += [(begin, rate), (end, -rate)]
    for link, steps in changes.items():
        if link not in fabric.capacity:
            continue
        load = 0.0
        for _, change in sorted(steps):  # at one time, what ends comes first
            load += change
            assert load <= fabric.capacity[link] * (1 + 1e-6), f"{seed=} {case} {link}"


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_starts_before_what_it_follows(seed: int) -> None:
    case, layer = _simulate(seed)
    for op in layer.graph.ops:
        assert op.end_us >= op.start_us >= 0, f"{seed=} {case}\n{op}"
        for later in op.then:
            assert later.start_us >= op.end_us - ROUNDING, f"{seed=} {case}\n{op}\n{later}"


@pytest.mark.parametrize("seed", SEEDS)
def test_copy_engines_are_not_shared(seed: int) -> None:
    case, layer = _simulate(seed)
    limit = make_cluster(case.mesh).gpu.num_copy_engines
    by_engine: dict[object, list[Op]] = defaultdict(list)
    for op in layer.graph.ops:
        if op.engine is not None and op.end_us > op.start_us:
            by_engine[op.engine].append(op)
    for ops in by_engine.values():
        times = sorted([(op.end_us, -1) for op in ops] + [(op.start_us, 1) for op in ops])
        at_once = 0
        for _, change in times:
            at_once += change
            assert at_once <= limit, f"{seed=} {case}"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_layer_gives_the_same_events(seed: int) -> None:
    case, layer = _simulate(seed)
    again = case.simulate(num_layers=NUM_LAYERS)
    assert again.events() == layer.events(), f"{seed=} {case}"


def test_cases_cover_every_schedule_and_both_kinds_of_transport() -> None:
    cases = [random_case(seed) for seed in SEEDS]
    assert {case.schedule for case in cases} == {"usp", "torus", "folded", "pipelined"}
    assert {case.transport.two_sided for case in cases} == {True, False}
