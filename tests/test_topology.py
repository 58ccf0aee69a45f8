"""Ranks are placed on machines by host or by an even split, and links follow from that."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.topology import Link, Topology


def test_split_places_consecutive_ranks_together() -> None:
    assert Topology.split(6, 3).machine_of == (0, 0, 1, 1, 2, 2)


def test_hosts_number_machines_by_first_appearance() -> None:
    topology = Topology.from_hosts(["b", "b", "a", "b"])
    assert topology.machine_of == (0, 0, 1, 0)
    assert not topology.is_even


def test_even_means_equal_and_consecutive() -> None:
    assert Topology((0, 0, 1, 1)).is_even
    assert not Topology((0, 1, 0, 1)).is_even
    assert not Topology((0, 0, 0, 1)).is_even


def test_link_classes() -> None:
    topology = Topology.split(4, 2)
    assert topology.link(1, 1) is Link.SAME_RANK
    assert topology.link(0, 1) is Link.SAME_MACHINE
    assert topology.link(1, 2) is Link.ACROSS_MACHINES


@pytest.mark.parametrize(("num_ranks", "num_machines"), [(4, 3), (4, 0), (4, 8), (0, 1)])
def test_machines_must_divide_the_ranks(num_ranks: int, num_machines: int) -> None:
    with pytest.raises(ValueError, match=f"{num_ranks} ranks / {num_machines} machines"):
        Topology.split(num_ranks, num_machines)


def test_machine_numbers_must_be_canonical() -> None:
    with pytest.raises(ValueError, match=r"in order of first appearance, got \(1, 0\)"):
        Topology((1, 0))
