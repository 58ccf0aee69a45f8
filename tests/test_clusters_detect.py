"""A running job's cluster: from what ranks see, the same description on each of them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import cast

import pytest
import torch

from swiftfusion_xdit import detect
from swiftfusion_xdit.autoplan import transport_of, with_way_across
from swiftfusion_xdit.clusters import GPUS
from swiftfusion_xdit.comm import Communicator
from swiftfusion_xdit.detect import Probe, describe, gpu_index, least_nvlinks, network_cards
from swiftfusion_xdit.planner import plan
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.transport import nccl, one_sided
from swiftfusion_xdit.topology import Topology

H200 = Probe(
    gpu=gpu_index("NVIDIA H200"), num_units=132, memory_mib=143771, product_gflops=700_000,
    memory_mb_per_s=4_200_000, inside_mb_per_s=390_000, inside_ns=4800, nvlinks=18,
    num_cards=8, network_mbit=3_200_000, is_rdma=1,
)  # fmt: skip


def test_words_carry_a_probe() -> None:
    assert Probe.from_words(H200.words()) == H200
    assert all(type(word) is int for word in H200.words())


def test_the_order_of_equal_probes_does_not_matter_and_the_slowest_counts() -> None:
    slow = dataclasses.replace(H200, inside_mb_per_s=300_000, memory_mb_per_s=4_000_000)
    topology = Topology.split(4, 2)
    found = {
        describe(order, topology) for order in itertools.permutations([H200, H200, H200, slow])
    }
    assert len(found) == 1
    cluster = found.pop()
    assert cluster.inside.gb_per_s == 300 and cluster.gpu.memory_gb_per_s == 4000
    assert (cluster.num_machines, cluster.gpus_per_machine) == (2, 2)
    assert cluster.gpu.attention_tflops == GPUS["h200"].attention_tflops


def test_a_gpu_gets_the_cards_beside_it() -> None:
    cluster = describe([H200] * 16, Topology.split(16, 2))
    assert cluster.across is not None and cluster.across_gb_per_s_per_gpu is not None
    assert cluster.across.gb_per_s == pytest.approx(8 * cluster.across_gb_per_s_per_gpu)
    fewer = dataclasses.replace(H200, num_cards=4, network_mbit=400_000)
    shared = describe([fewer] * 16, Topology.split(16, 2))
    assert shared.across is not None and shared.across_gb_per_s_per_gpu is not None
    assert shared.across.gb_per_s == pytest.approx(4 * shared.across_gb_per_s_per_gpu)


def test_what_the_transport_gets_to_another_machine_counts_for_more_than_its_cards() -> None:
    measured = dataclasses.replace(H200, across_mb_per_s=3_000)
    slower = dataclasses.replace(H200, across_mb_per_s=2_500)
    cluster = describe([measured, slower] * 4, Topology.split(8, 2))
    assert cluster.across is not None and cluster.across_gb_per_s_per_gpu is None
    assert cluster.across.gb_per_s == 4 * 2.5
    one_blind = describe([measured, H200] * 4, Topology.split(8, 2))
    assert one_blind.across == describe([H200] * 8, Topology.split(8, 2)).across


class Measured:
    """A transport that gets so many GB/s to another machine, or does not know."""

    def __init__(self, gb_per_s: float | None, *, two_sided: bool = False) -> None:
        self.gb_per_s, self.two_sided = gb_per_s, two_sided

    def measure_across(self) -> float | None:
        return self.gb_per_s


def across(comm: Measured, hosts: list[str]) -> tuple[float, float, float]:
    """GB/s and latency between two machines of two GPUs, and what the transport reaches of them."""
    probe = with_way_across(H200, cast("Communicator", comm), hosts)
    cluster = describe([probe] * 4, Topology.split(4, 2))
    assert cluster.across is not None
    known = bool(probe.across_mb_per_s)
    transport = transport_of(cast("Communicator", comm), is_known=known)
    return cluster.across.gb_per_s, cluster.across.latency_us, transport.across.fraction


def test_a_known_way_is_simulated_as_it_is() -> None:
    apart, together = ["a", "a", "b", "b"], ["a"] * 4
    cards = describe([H200] * 4, Topology.split(4, 2)).across
    assert cards is not None
    fraction = one_sided().across.fraction
    assert across(Measured(None), apart) == (cards.gb_per_s, cards.latency_us, fraction)
    for hosts in (apart, together):
        assert across(Measured(3.0, two_sided=True), hosts)[::2] == (6.0, 1.0)
    assert across(Measured(None, two_sided=True), apart)[2] == nccl().across.fraction < 1


def test_machines_that_one_host_plays_reach_each_other_as_it_reaches_itself() -> None:
    assert across(Measured(None), ["a"] * 4) == (2 * 390.0, 4.8, 1.0)


def test_unknown_gpus_and_networks_are_described_by_what_was_measured() -> None:
    probe = dataclasses.replace(H200, gpu=-1, num_cards=0, network_mbit=0, is_rdma=0)
    cluster = describe([probe] * 2, Topology.split(2, 1))
    assert cluster.gpu.gemm_tflops == 700 and cluster.gpu.num_units == 132
    assert cluster.across is not None and 0 < cluster.across.gb_per_s < 2
    hidden = describe([dataclasses.replace(probe, inside_mb_per_s=0)] * 2, Topology.split(2, 1))
    assert 300 < hidden.inside.gb_per_s < 450  # of 18 NVLinks
    bridge = dataclasses.replace(probe, inside_mb_per_s=0, nvlinks=0)
    assert describe([bridge] * 2, Topology.split(2, 1)).inside.gb_per_s < 20


def test_processors_have_a_description_that_can_be_planned_on() -> None:
    probe = detect.probe("cpu")
    assert probe.gpu == -2
    for topology in (Topology.split(4, 2), Topology.split(8, 1)):
        cluster = describe([probe] * topology.num_ranks, topology)
        assert cluster.topology == topology
        shape = LayerShape.even(topology.num_ranks, sequence=1088, num_heads=24, head_dim=128)
        assert plan(cluster, shape).mesh.size == topology.num_ranks


def test_uneven_machines_are_refused() -> None:
    with pytest.raises(ValueError, match="equal machines"):
        describe([H200] * 3, Topology((0, 0, 1)))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"), ("NVIDIA L40", "l40"), ("NVIDIA L40S", None),
        ("NVIDIA GB200", "gb200"), ("Tesla V100-SXM2-32GB", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_name_that_cuda_gives(name: str, known: str | None) -> None:
    assert gpu_index(name) == (-1 if known is None else list(GPUS).index(known))


def test_nvlinks_are_read_from_the_matrix() -> None:
    matrix = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tNV12\tPIX\t0-15\nGPU1\tNV18\t X \tNV18\tNODE\t0-15\n"
        "GPU2\tNV12\tNV18\t X \tSYS\t0-15\nNIC0\tPIX\tNODE\tSYS\t X \n"
    )
    assert least_nvlinks(matrix) == 12
    assert least_nvlinks(matrix.replace("NV12", "PHB")) == 0
    assert least_nvlinks("") == 0


def add(path: Path, **files: str) -> None:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text + "\n", encoding="utf-8")


def test_network_cards_are_read_from_sysfs(tmp_path: Path) -> None:
    assert network_cards(tmp_path) == (0, 0, 0)
    add(tmp_path / "net/eth0", speed="100000", operstate="up", device="")
    add(tmp_path / "net/eth1", speed="-1", operstate="down", device="")
    add(tmp_path / "net/lo", operstate="unknown")
    add(tmp_path / "net/veth1", speed="10000", operstate="up")
    assert network_cards(tmp_path) == (1, 100_000, 0)
    for i in range(2):
        add(
            tmp_path / f"infiniband/mlx5_{i}/ports/1", rate="400 Gb/sec (4X NDR)", state="4: ACTIVE"
        )
    add(tmp_path / "infiniband/mlx5_2/ports/1", rate="10 Gb/sec (4X SDR)", state="1: DOWN")
    assert network_cards(tmp_path) == (2, 800_000, 1)
    assert network_cards(tmp_path, rdma=False) == (1, 100_000, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_job_that_goes_by_tcp_has_no_rdma(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    sysfs = tmp_path / "sys"
    add(sysfs / "infiniband/mlx5_0/ports/1", rate="400 Gb/sec (4X NDR)", state="4: ACTIVE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NCCL_NET", raising=False)
    monkeypatch.setattr(detect, "SYSFS", sysfs)
    monkeypatch.setattr(detect, "measure", lambda index: H200)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    found = detect.probe(device)
    assert (found.num_cards, found.network_mbit, found.is_rdma) == (1, 400_000, 1)
    monkeypatch.setenv("NCCL_NET", "Socket")  # what was measured is still in the cache
    found = detect.probe(device)
    assert (found.num_cards, found.network_mbit, found.is_rdma) == (0, 0, 0)


def test_measurements_are_cached_for_a_set_of_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(index: int) -> Probe:
        measured.append(index)
        return dataclasses.replace(H200, num_cards=0, network_mbit=0, is_rdma=0)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(detect, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    first = detect.probe("cuda:0", machine_set=["a", "b"])
    assert detect.probe("cuda:0", machine_set=["b", "a", "a"]) == first
    assert measured == [0]
    detect.probe("cuda:1", machine_set=["a", "b"])
    detect.probe("cuda:0", machine_set=["a"])
    assert measured == [0, 1, 0]
    for path in tmp_path.rglob("*.json"):
        path.write_text("{", encoding="utf-8")
    assert detect.probe("cuda:0", machine_set=["a", "b"]) == first
    assert measured == [0, 1, 0, 0]
