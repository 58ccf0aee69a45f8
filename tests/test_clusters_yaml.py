"""A cluster in a YAML file is read key by key; what is wrong in it is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from swiftfusion_xdit.clusters import GPUS, from_yaml, load, preset
from swiftfusion_xdit.simulate.hardware import Cluster, Link

COMPLETE = """
num_machines: 2
gpus_per_machine: 4
gpu:
  name: mine
  num_units: 100
  attention_tflops: {64: 100, 128: 150.5}
  gemm_tflops: 200
  memory_gb_per_s: 1500
  memory_gib: 40
inside: {gb_per_s: 200, latency_us: 4}
across: {gb_per_s: 25, latency_us: 12.5}
across_gb_per_s_per_gpu: 12.5
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "lab.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_complete_file_gives_its_numbers(tmp_path: Path) -> None:
    cluster = from_yaml(write(tmp_path, COMPLETE))
    assert cluster.name == "lab"
    assert (cluster.num_machines, cluster.gpus_per_machine) == (2, 4)
    assert cluster.gpu.attention_tflops == ((64, 100), (128, 150.5))
    assert cluster.across == Link(25, 12.5) and cluster.across_gb_per_s_per_gpu == 12.5


def test_a_preset_fills_in_what_is_left_out(tmp_path: Path) -> None:
    text = "preset: p4de\nname: ours\nnum_machines: 3\ngpu: h100\nacross: {latency_us: 9}\n"
    cluster = load(str(write(tmp_path, text)))
    base = preset("p4de")
    assert base.across is not None
    assert cluster == dataclasses.replace(
        base, name="ours", num_machines=3, gpu=GPUS["h100"],
        across=Link(base.across.gb_per_s, 9),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "preset: p4de\nnics: 4",
            "unknown key 'nics'; allowed are name, gpu, num_machines, .*preset",
        ),
        (
            "preset: p4de\nacross: {gbps: 4}",
            "across has an unknown key 'gbps'; allowed are gb_per_s",
        ),
        ("preset: p4de\nacross: {gb_per_s: -1}", "across: .*gb_per_s must be .*above 0, got -1"),
        ("preset: p4de\ninside: {latency_us: -1}", "inside: .*latency_us must be .*at least 0"),
        ("preset: p4de\ninside: {gb_per_s: fast}", "inside: .*gb_per_s must be a number"),
        ("preset: p4de\ninside: {gb_per_s: .nan}", "inside: .*gb_per_s must be a number"),
        ("preset: p4de\ninside: 7", "inside must be a mapping"),
        ("preset: p9", "topology must be one of gb200-nvl72, h100, .* got 'p9'"),
        ("preset: p4de\ngpu: v100", "gpu must be one of a100, .* got 'v100'"),
        ("preset: p4de\ngpu: {num_units: 1.5}", "gpu: num_units must be a positive integer"),
        ("preset: p4de\nnum_machines: 0", "num_machines must be a positive integer, got 0"),
        ("preset: p4de\nnum_machines: yes", "num_machines must be a positive integer, got True"),
        ("preset: p4de\nacross:", "across is missing, but there are several machines"),
        ("gpu: a100", "misses num_machines, gpus_per_machine, inside; needed are"),
        (COMPLETE.replace("  num_units: 100\n", ""), "gpu misses num_units; needed are"),
        (COMPLETE.replace("{64: 100, 128: 150.5}", "150"), "attention_tflops must be a mapping"),
        (COMPLETE.replace("64: 100", "64: 0"), "attention_tflops must be a number above 0, got 0"),
        ("- p4de", "the top level must be a mapping"),
        ("gpu: [", "cannot be read"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        from_yaml(path)
    assert "lab.yaml" in str(caught.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        load(str(tmp_path / "none.yaml"))


def test_every_field_of_a_cluster_can_be_set(tmp_path: Path) -> None:
    base = preset("p5")
    text = "\n".join(
        f"{field.name}: {getattr(base, field.name)}"
        for field in dataclasses.fields(Cluster)
        if isinstance(getattr(base, field.name), (int, float, str))
    )
    text += f"\ngpu: h100\ninside: {dataclasses.asdict(base.inside)}"
    assert base.across is not None
    text += f"\nacross: {dataclasses.asdict(base.across)}"
    assert from_yaml(write(tmp_path, text)) == base
