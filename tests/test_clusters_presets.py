"""Presets: the machines by name, their numbers, and other counts of machines and GPUs."""

from __future__ import annotations

import pytest

from swiftfusion_xdit.clusters import HOME, PRESETS, home_of, preset, resize


def test_all_presets_are_there_and_plausible() -> None:
    assert {"p4de", "p5", "h200-2", "h200-8", "l40-pcie", "gb200-nvl72"} == set(PRESETS)
    for name, cluster in PRESETS.items():
        assert cluster.name == name and cluster.across is not None
        share = cluster.across.gb_per_s / cluster.gpus_per_machine
        alone = cluster.across_gb_per_s_per_gpu or cluster.across.gb_per_s
        assert share <= alone * (1 + 1e-9) <= cluster.across.gb_per_s * (1 + 1e-9), name
        assert share < cluster.inside.gb_per_s < cluster.gpu.memory_gb_per_s, name
        rates = [tflops for _, tflops in sorted(cluster.gpu.attention_tflops)]
        assert rates == sorted(rates), name


def test_p4de_is_the_cluster_of_the_paper() -> None:
    cluster = preset("p4de")
    assert (cluster.num_machines, cluster.gpus_per_machine, cluster.gpu.num_units) == (4, 8, 108)
    assert cluster.across is not None
    assert 0.9 * 50 < cluster.across.gb_per_s <= 50  # 400 Gbit/s a machine


def test_h100_is_another_name_of_p5() -> None:
    assert preset("h100") == preset("p5")
    assert {gpu: preset(home_of(gpu)).gpu.name for gpu in HOME} == {gpu: gpu for gpu in HOME}


def test_other_counts_of_machines_and_gpus() -> None:
    cluster = preset("p5", num_machines=2, gpus_per_machine=4)
    assert (cluster.num_machines, cluster.gpus_per_machine, cluster.num_ranks) == (2, 4, 8)
    assert cluster.across == preset("p5").across
    assert resize(cluster) is cluster


@pytest.mark.parametrize("number", [0, -1, True, 1.5])
def test_counts_that_are_no_counts_are_refused(number: object) -> None:
    with pytest.raises(ValueError, match="num_machines must be a positive integer"):
        preset("p4de", num_machines=number)  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"topology must be one of .*p4de.* got 'p3'"):
        preset("p3")
    with pytest.raises(ValueError, match=r"gpu must be one of a100, .* got 'v100'"):
        home_of("v100")
