"""What this machine has: processors, GPUs, drivers and the versions of what is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = (
    "torch",
    "xfuser",
    "swiftfusion-xdit",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "flash-attn-3",
    "flash-attn",
    "nvshmem4py-cu13",
    "nvidia-nvshmem-cu13",
)


def cpu_model() -> str:
    """The processor's name as Linux reports it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of every visible GPU."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def nvidia_smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None if it is missing or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def driver_version() -> str | None:
    """The NVIDIA driver's version; None without a driver."""
    printed = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if printed and printed.strip():
        return printed.split()[0]
    path = Path("/proc/driver/nvidia/version")
    if path.exists():
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", path.read_text(encoding="utf-8"))
        return found.group(1) if found else None
    return None


def links(topology: str) -> dict[tuple[int, int], str]:
    """How each pair of GPUs is linked, from what ``nvidia-smi topo -m`` prints.

    ``NV18`` is 18 NVLinks; ``PIX``, ``PXB``, ``PHB``, ``NODE`` and ``SYS`` are ever longer ways
    over PCIe.
    """
    # Headings are underlined by escape sequences.
    lines = re.sub(r"\x1b\[[0-9;]*m", "", topology).splitlines()
    rows = {}
    for line in lines:
        words = line.split()
        if len(words) > 1 and re.fullmatch(r"GPU\d+", words[0]) and not words[1].startswith("GPU"):
            rows[int(words[0][3:])] = words[1:]
    found = {}
    for a, row in rows.items():
        for b in rows:
            if a < b < len(row):
                found[a, b] = row[b]
    return found


def nccl_version() -> str | None:
    """The NCCL that torch uses; None in a build without."""
    try:
        # Import makes no CUDA context.
        from torch.cuda import nccl

        return ".".join(map(str, nccl.version()))
    except (ImportError, AttributeError, RuntimeError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter here, those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """Processor and GPUs, for a file of results."""
    found = gpus()
    topology = nvidia_smi("topo", "-m") if len(found) > 1 else None
    pairs = links(topology) if topology else {}
    return {
        "cpu": cpu_model(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": found,
        "gpu_links": sorted(set(pairs.values())),
    }


def versions() -> dict[str, str]:
    """Python, kernel, driver, CUDA libraries and packages, for a file of results."""
    from swiftfusion_xdit import __version__

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "linux": platform.release(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version() or "") or None,
        "nccl": nccl_version(),
    }
    # What runs is what was imported, also where it is not installed.
    found |= {**package_versions(), "torch": torch.__version__, "swiftfusion-xdit": __version__}
    return {name: version for name, version in found.items() if version}
