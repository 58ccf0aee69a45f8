"""The checks of `swiftfusion doctor` that need no GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from swiftfusion_xdit import bootstrap, envs
from swiftfusion_xdit.cli.findings import Check, Finding, missing, ok, unsuitable

PYTHONS = ((3, 10), (3, 14))  # the first supported one, and the first that is not any more
OLDEST_TORCH = "2.6"
SHM = Path("/dev/shm")
LEAST_SHM_BYTES = 2**28
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
TOLERANCE = 1e-5
NO_VARIABLES = "none of SWIFTFUSION_* is set"


def check_python() -> list[Finding]:
    first, end = PYTHONS
    found = f"{platform.python_version()} at {sys.executable}"
    if first <= sys.version_info[:2] < end:
        return ok("python", found)
    return unsuitable("python", f"{found}; supported are 3.{first[1]} to 3.{end[1] - 1}")


def check_torch() -> list[Finding]:
    if importlib.util.find_spec("torch") is None:
        return missing("torch", "not installed", f"pip install 'torch>={OLDEST_TORCH}'")
    import torch
    from packaging.version import Version

    if Version(torch.__version__) < Version(OLDEST_TORCH):
        return unsuitable(
            "torch",
            f"{torch.__version__} is older than {OLDEST_TORCH}",
            f"pip install --upgrade 'torch>={OLDEST_TORCH}'",
        )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return ok("torch", f"{torch.__version__}, built with {build}")


def check_xfuser() -> list[Finding]:
    from swiftfusion_xdit.xdit import compat

    command = f"pip install 'xfuser{compat.SUPPORTED_VERSIONS}'"
    if importlib.util.find_spec("xfuser") is None:
        return missing("xfuser", "not installed", command)
    version = compat.installed_version()
    if not compat.is_supported(version):
        reason = f"{version} is not one that the plugin knows: {compat.SUPPORTED_VERSIONS}"
        return unsuitable("xfuser", reason, command)
    return ok("xfuser", f"{version}, supported are {compat.SUPPORTED_VERSIONS}")


def check_entry_point() -> list[Finding]:
    """Whether `import torch` loads the plugin."""
    name = "entry point"
    entries = importlib.metadata.entry_points(group="torch.backends")
    if not any(entry.value.startswith("swiftfusion_xdit.bootstrap:") for entry in entries):
        reason = "not registered: the package is on the path without being installed"
        return missing(name, reason, "pip install swiftfusion-xdit, or swiftfusion xdit ...")
    if os.environ.get(AUTOLOAD, "1") != "1":
        reason = f"registered, but {AUTOLOAD}={os.environ[AUTOLOAD]} switches it off"
        return unsuitable(name, reason, f"unset {AUTOLOAD}, or swiftfusion xdit ...")
    if os.environ.get("SWIFTFUSION_DISABLE") is not None and envs.get("DISABLE"):
        reason = "registered, but SWIFTFUSION_DISABLE switches it off"
        return unsuitable(name, reason, "unset SWIFTFUSION_DISABLE")
    if "torch" in sys.modules and not bootstrap.is_installed():
        return unsuitable(name, "registered, but this torch has not loaded it: is it too old?")
    return ok(name, "torch.backends loads swiftfusion_xdit.bootstrap, and has done so here")


def check_variables() -> list[Finding]:
    """Whether every SWIFTFUSION_* variable is one that exists and holds a value that it can."""
    name = "variables"
    known = {envs.PREFIX + alias: key for key in envs.VARIABLES for alias in _names(key)}
    found = sorted(key for key in os.environ if key.startswith(envs.PREFIX))
    if unknown := [key for key in found if key not in known]:
        return unsuitable(name, f"not known: {', '.join(unknown)}", f"unset {' '.join(unknown)}")
    for key in found:
        try:
            envs.get(known[key])
        except ValueError as error:
            return unsuitable(name, str(error), f"unset {key}")
    return ok(name, ", ".join(f"{key}={os.environ[key]}" for key in found) or NO_VARIABLES)


def _names(key: str) -> tuple[str, ...]:
    return (key, *envs.VARIABLES[key].aliases)


def check_shared_memory() -> list[Finding]:
    name = "shared memory"
    if not SHM.is_dir():
        return missing(name, f"no {SHM}", f"mount -t tmpfs -o size=8G tmpfs {SHM}")
    if not os.access(SHM, os.W_OK):
        return unsuitable(name, f"{SHM} cannot be written by this user", f"chmod 1777 {SHM}")
    usage = shutil.disk_usage(SHM)
    found = f"{SHM} has {usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    if usage.free < LEAST_SHM_BYTES:
        remedy = f"mount -o remount,size=8G {SHM} (in containers: --shm-size 8g)"
        return unsuitable(name, f"{found}, less than {LEAST_SHM_BYTES / 2**30:g}", remedy)
    return ok(name, found)


def check_attention_on_the_cpu() -> list[Finding]:
    """One layer over shared memory, by a group of one rank, against the oracle."""
    name = "attention on the CPU"
    import torch
    import torch.distributed as dist

    from swiftfusion_xdit.attention.reference import reference_attention, relative_error
    from swiftfusion_xdit.sequence_parallel import SequenceParallel

    if dist.is_initialized():
        return unsuitable(name, "a process group exists already in this process")
    q, k, v = torch.randn(3, 1, 64, 4, 32, generator=torch.Generator().manual_seed(0)).unbind()
    with tempfile.TemporaryDirectory(prefix="swiftfusion-doctor-") as directory:
        store = dist.FileStore(str(Path(directory) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            with SequenceParallel(machines=1, transport="shm", backend="cpu", device="cpu") as sp:
                with torch.no_grad():
                    error = relative_error(sp.attention(q, k, v), reference_attention(q, k, v))
        finally:
            dist.destroy_process_group()
    if not error <= TOLERANCE:
        return unsuitable(name, f"one layer over shm is wrong by {error:.1e}")
    return ok(name, f"one layer over shm, relative error {error:.1e}")


HOST_CHECKS: tuple[Check, ...] = (
    check_python,
    check_torch,
    check_xfuser,
    check_entry_point,
    check_variables,
    check_shared_memory,
    check_attention_on_the_cpu,
)
