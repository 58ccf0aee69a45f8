"""`swiftfusion doctor` says what is there and what is missing; its status is the CPU path's."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftfusion_xdit.attention.cpu import CpuBackend
from swiftfusion_xdit.cli import doctor, doctor_cuda, doctor_host, machine
from swiftfusion_xdit.cli.findings import Finding, Status
from swiftfusion_xdit.cli.main import main
from swiftfusion_xdit.xdit import compat

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPXB\t0-31\t0
GPU1\tNV18\t X \tPIX\tSYS\t0-31\t0
GPU2\tSYS\tPIX\t X \tSYS\t0-31\t0
NIC0\tPXB\tSYS\tSYS\t X

Legend:

  NV#  = Connection traversing a bonded set of # NVLinks
"""


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def fine() -> list[Finding]:
    return [Finding(name, Status.OK, "found") for name in doctor.NEEDED]


def test_this_machine_passes_and_json_has_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [line["name"] for line in report["findings"]]
    assert report["cpu_path_works"] and set(doctor.NEEDED) <= set(names)
    for expected in ("driver", "nccl", "nvshmem", "kernel fa4", "compiled part", "entry point"):
        assert expected in names
    for line in report["findings"]:
        assert line["status"] in ("ok", "missing", "unsuitable"), line
        assert line["detail"] and "the check failed" not in line["detail"], line
        assert line["status"] != "missing" or line["remedy"], line


def test_exit_status_tells_whether_the_cpu_path_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Finding("gpus", Status.MISSING, "none [at all]", "buy one")
    monkeypatch.setattr(doctor, "HOST_CHECKS", (fine,))
    monkeypatch.setattr(doctor_cuda, "CUDA_CHECKS", (lambda: [absent],))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "none [at all]" in shown and "-> buy one" in shown and "CPU path works" in shown

    monkeypatch.setattr(doctor, "HOST_CHECKS", (lambda: fine()[1:],))
    assert main(["doctor"]) == 1
    assert "does not work" in capsys.readouterr().out


def test_without_torch_the_doctor_still_speaks() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from swiftfusion_xdit.cli.main import main; sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout)["findings"]}
    assert lines["torch"]["status"] != "ok"
    assert lines["python"]["status"] == "ok"


def test_a_check_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_the_moon() -> list[Finding]:
        raise OSError("too far")

    broken = only(doctor.examine((check_the_moon,)))
    assert broken.status is Status.UNSUITABLE and broken.name == "the moon"
    assert "OSError: too far" in broken.detail


@pytest.mark.parametrize(
    ("version", "status"), [("0.7.3", Status.OK), ("0.8.0", Status.UNSUITABLE)]
)
def test_xfuser_version(version: str, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: version)
    found = only(doctor_host.check_xfuser())
    assert found.status is status and version in found.detail


def test_autoload_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(value="swiftfusion_xdit.bootstrap:autoload")
    entries: list[Any] = [entry]
    monkeypatch.setattr(doctor_host.importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.setattr(doctor_host.bootstrap, "is_installed", lambda: True)
    monkeypatch.delenv(doctor_host.AUTOLOAD, raising=False)
    assert only(doctor_host.check_entry_point()).status is Status.OK
    monkeypatch.setenv(doctor_host.AUTOLOAD, "0")
    found = only(doctor_host.check_entry_point())
    assert found.status is Status.UNSUITABLE and doctor_host.AUTOLOAD in found.detail
    entries.clear()
    found = only(doctor_host.check_entry_point())
    assert found.status is Status.MISSING and "pip install" in str(found.remedy)


@pytest.mark.parametrize(
    ("name", "value"), [("SWIFTFUSION_TIMEOUT_S", "soon"), ("SWIFTFUSION_TIMEOUT", "10")]
)
def test_variables_that_do_nothing(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    found = only(doctor_host.check_variables())
    assert found.status is Status.UNSUITABLE and name in found.detail


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=2**20, total=2**26)
    monkeypatch.setattr(doctor_host.shutil, "disk_usage", lambda path: usage)
    found = only(doctor_host.check_shared_memory())
    assert found.status is Status.UNSUITABLE and "remount" in str(found.remedy)


def test_links_are_read_from_nvidia_smi() -> None:
    assert machine.links(TOPOLOGY) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "PIX"}
    assert machine.links("no topology here") == {}


@pytest.mark.parametrize("reached", [True, False])
def test_gpus_that_do_not_reach_each_other(reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reached)
    monkeypatch.setattr(machine, "nvidia_smi", lambda *arguments: TOPOLOGY)
    links, p2p = doctor_cuda.check_links()
    assert links.status is Status.OK and "NV18" in links.detail
    assert p2p.status is (Status.OK if reached else Status.UNSUITABLE)
    assert reached or "0 -> 1, 1 -> 0" in p2p.detail


def test_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "Old", "memory_gib": 16.0, "multiprocessors": 80}
    gpus = [{**gpu, "compute_capability": "7.0"}, {**gpu, "compute_capability": "10.0"}]
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    old, new = doctor_cuda.check_gpus()
    assert old.status is Status.UNSUITABLE and "8.0" in old.detail
    assert new.status is Status.OK


def test_kernels_that_are_not_installed_or_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftfusion_xdit import attention

    def select(name: str, device: torch.device) -> Any:
        if name == "fa4":
            raise ModuleNotFoundError("fa4 needs flash-attn-4: pip install flash-attn-4")
        if name == "fa3":
            raise NotImplementedError("fa3 runs on compute capability 9.x")
        return SimpleNamespace(has_lse=True, max_head_dim=128)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "select_backend", select)
    found = {finding.name: finding for finding in doctor_cuda.check_attention_kernels()}
    assert found["kernel fa4"].remedy == "pip install flash-attn-4"
    assert found["kernel fa3"].status is Status.UNSUITABLE
    assert found["kernel cudnn"].status is Status.OK


def test_fused_says_why_its_layers_are_pipelined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in only(doctor_cuda.check_fused()).detail
    backend = CpuBackend(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("swiftfusion_xdit.attention.select_backend", lambda *_: backend)
    found = only(doctor_cuda.check_fused())
    assert "'cpu' has no kernel that waits for peers; layers are pipelined instead" in found.detail
    monkeypatch.setattr(CpuBackend, "not_fused_because", lambda self, **_: "")
    assert "waits for peers itself" in only(doctor_cuda.check_fused()).detail


def test_nvshmem_that_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def run(*args: Any, **kwargs: Any) -> Any:
        return subprocess.CompletedProcess(args, -6, stdout="", stderr="a\nno driver\n")

    monkeypatch.setattr(doctor_cuda.subprocess, "run", run)
    found = only(doctor_cuda.check_nvshmem())
    assert found.status is Status.UNSUITABLE and "no driver" in found.detail
