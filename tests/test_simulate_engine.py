"""The engine's rules: fair links, held units, counted engines, and no circles."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.simulate.engine import Engine, Op, OpGraph, fair_rates


def _run(ops: list[Op], capacity: dict | None = None, engines: dict | None = None) -> None:
    graph = OpGraph()
    for op in ops:
        graph.add(op)
    Engine(graph, capacity=capacity or {}, engines=engines or {}, num_units=10).run()


def test_rates_are_max_min_fair() -> None:
    flows = {0: ("a",), 1: ("a", "b"), 2: ("b",), 3: ("free",)}
    rates = fair_rates(flows, {"a": 10.0, "b": 30.0})
    assert rates == {0: 5.0, 1: 5.0, 2: 25.0}


def test_a_flow_takes_what_another_leaves() -> None:
    long, short = (
        Op(0, "s", name, num_bytes=n, links=("a",)) for name, n in (("l", 300), ("s", 100))
    )
    _run([long, short], {"a": 10.0})
    assert short.end_us == pytest.approx(20.0)
    assert long.end_us == pytest.approx(40.0)


def test_attention_slows_while_units_are_held() -> None:
    attend = Op(0, "compute", "attend", attend_us=100.0)
    enter = Op(0, "nccl", "enter", holds=5, delay_us=40.0)
    graph = OpGraph()
    graph.add(attend)
    graph.add(enter)
    graph.add(Op(0, "nccl", "leave", holds=-5), [enter])
    Engine(graph, capacity={}, engines={}, num_units=10).run()
    assert attend.end_us == pytest.approx(120.0)


def test_a_transfer_slows_while_an_end_attends() -> None:
    attend = Op(1, "compute", "attend", attend_us=50.0)
    flow = Op(0, "nccl", "send", num_bytes=100.0, links=("a",), ends=(0, 1), under_compute=0.5)
    _run([attend, flow], {"a": 1.0})
    assert flow.end_us == pytest.approx(125.0)


def test_copies_wait_for_an_engine_in_order() -> None:
    copies = [Op(0, "s", str(i), num_bytes=10.0, links=("a",), engine="e") for i in range(3)]
    _run(copies, {"a": 1.0}, {"e": 1})
    assert [op.end_us for op in copies] == pytest.approx([10.0, 20.0, 30.0])


def test_a_circle_is_named() -> None:
    graph = OpGraph()
    first, second = graph.add(Op(3, "s", "wait here")), graph.add(Op(4, "s", "wait there"))
    graph.order(first, second)
    graph.order(second, first)
    with pytest.raises(ValueError, match="circle: rank 3, wait here"):
        Engine(graph, capacity={}, engines={}, num_units=1).run()
