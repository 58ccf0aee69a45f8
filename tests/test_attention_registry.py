"""Which attention kernel is chosen, and what is said about one that cannot be used."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftfusion_xdit.attention import select_backend
from tests.fake_kernels import GPU, FakeGpu

HOPPER, AMPERE, BLACKWELL, TURING = (9, 0), (8, 0), (10, 0), (7, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["auto", "fa4", "fa3", "fa2", "cudnn", "sdpa_flash"])
def test_without_a_gpu(name: str) -> None:
    with pytest.raises(NotImplementedError, match="cuda:0 needs an NVIDIA GPU and torch built for"):
        select_backend(name, GPU)


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("fa4", "flash-attn-4", "pip install --upgrade flash-attn-4"),
        ("fa3", "flash-attn-3", "pip install --no-build-isolation 'git"),
        ("fa2", "flash-attn", "pip install --no-build-isolation flash-attn"),
    ],
)
def test_package_that_is_not_installed(
    name: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(monkeypatch, HOPPER)
    message = f"backend '{name}' needs the package {package}, which is not installed: {command}"
    with pytest.raises(ModuleNotFoundError, match=message):
        select_backend(name, GPU)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('undefined symbol: x')", "OSError: undefined symbol: x"),
        ("import absent_dependency", "ModuleNotFoundError: No module named 'absent_dependency'"),
    ],
)
def test_package_that_does_not_import(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(monkeypatch, HOPPER)
    (tmp_path / "flash_attn_interface.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    with pytest.raises(ImportError, match=rf"package flash-attn-3 \({reason}\)") as raised:
        select_backend("fa3", GPU)
    assert not isinstance(raised.value, ModuleNotFoundError)


def old_kernel(q: Any, k: Any, v: Any, softmax_scale: Any = None) -> Any:
    raise AssertionError("never called")


@pytest.mark.parametrize("functions", [{"_flash_attn_fwd": old_kernel}, {"other": old_kernel}])
def test_version_without_the_function(
    functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, HOPPER)
    gpu.install("fa4", **functions)
    with pytest.raises(ImportError, match=r"has no _flash_attn_fwd\(lse, out, return_lse, softmax"):
        select_backend("fa4", GPU)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("fa4", TURING),
        ("fa3", BLACKWELL),
        ("fa2", TURING),
        ("cudnn", TURING),
        ("sdpa_flash", TURING),
    ],
)
def test_gpu_that_the_kernel_does_not_run_on(
    name: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(monkeypatch, capability)
    major, minor = capability
    message = rf"backend '{name}' runs on GPUs of compute capability .*; cuda:0 has {major}.{minor}"
    with pytest.raises(NotImplementedError, match=message):
        select_backend(name, GPU)


@pytest.mark.parametrize("version", [None, 8907])
def test_old_or_absent_cudnn(version: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, HOPPER).cudnn(version)
    with pytest.raises(NotImplementedError, match=f"'cudnn' needs cuDNN 90000.*; got {version}"):
        select_backend("cudnn", GPU)


@pytest.mark.parametrize(
    ("capability", "installed", "cudnn", "chosen"),
    [
        (HOPPER, ("fa2", "fa3", "fa4"), 91900, "fa4"),
        (HOPPER, ("fa2", "fa3"), 91900, "fa3"),
        (HOPPER, ("fa2",), 91900, "cudnn"),
        (HOPPER, ("fa2",), None, "fa2"),
        (HOPPER, (), None, "sdpa_flash"),
        (BLACKWELL, ("fa2", "fa3", "fa4"), 91900, "fa4"),
        (BLACKWELL, ("fa2", "fa3"), 91900, "cudnn"),
        (AMPERE, ("fa2", "fa3", "fa4"), 91900, "cudnn"),
        (AMPERE, ("fa2", "fa3", "fa4"), 8907, "fa2"),
        (AMPERE, (), None, "sdpa_flash"),
    ],
)
def test_auto_takes_the_best_that_runs(
    capability: tuple[int, int],
    installed: tuple[str, ...],
    cudnn: int | None,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch, capability)
    gpu.cudnn(cudnn)
    for name in installed:
        gpu.install(name)
    backend = select_backend("auto", "cuda:0")
    assert backend.name == chosen
    assert backend.has_lse and backend.device == GPU


def test_auto_warns_of_a_broken_package_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = FakeGpu(monkeypatch, HOPPER)
    gpu.install("fa4", other=old_kernel)
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", GPU).name == "sdpa_flash"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot use the installed package flash-attn-4" in caplog.text


def test_auto_on_a_gpu_without_any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, TURING)
    with pytest.raises(NotImplementedError, match="no attention backend for cuda:0:") as raised:
        select_backend("auto", GPU)
    assert str(raised.value).count("cuda:0 has 7.5") == 3


def test_a_backend_for_gpus_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="'fa4' runs on device type 'cuda'; got device type 'cpu'"):
        select_backend("fa4", "cpu")
