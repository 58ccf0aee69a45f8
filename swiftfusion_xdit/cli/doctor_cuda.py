"""The checks of `swiftfusion doctor` about GPUs, their links and what runs on them."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import torch

from swiftfusion_xdit.cli import machine
from swiftfusion_xdit.cli.findings import Check, Finding, missing, ok, unsuitable

LEAST_CAPABILITY = (8, 0)
LEAST_DRIVER = {"12": "525", "13": "580"}  # by CUDA's major version
KERNELS = ("fa4", "fa3", "cudnn", "fa2", "sdpa_flash")
NO_GPU = "needs a GPU, and torch sees none"
# In a process of its own: libraries that find no driver may end the process.
NVSHMEM_PROBE = (
    "import nvshmem.core as n; v = n.get_version(); "
    "print(v.nvshmem4py_version, v.libnvshmem_version, sep='|')"
)
PROBE_TIMEOUT_S = 60


def check_driver() -> list[Finding]:
    version = machine.driver_version()
    if version is None:
        remedy = "install NVIDIA's driver (in containers: --gpus all)"
        return missing("driver", "no NVIDIA driver", remedy)
    least = LEAST_DRIVER.get((torch.version.cuda or "").partition(".")[0])
    if least is not None and int(version.partition(".")[0]) < int(least):
        reason = f"{version} is older than {least}, which CUDA {torch.version.cuda} needs"
        return unsuitable("driver", reason, f"install driver {least} or later")
    return ok("driver", version)


def check_cuda() -> list[Finding]:
    if torch.version.cuda is None:
        remedy = "pip install --force-reinstall torch, from an index with CUDA builds"
        return missing("cuda", f"torch {torch.__version__} is built without CUDA", remedy)
    if not torch.cuda.is_available():
        return unsuitable("cuda", f"torch is built for CUDA {torch.version.cuda} and sees no GPU")
    return ok("cuda", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")


def check_gpus() -> list[Finding]:
    gpus = machine.gpus()
    if not gpus:
        remedy = "none on this machine, or CUDA_VISIBLE_DEVICES hides them: unset it"
        return missing("gpus", "torch sees none", remedy)
    findings: list[Finding] = []
    for index, gpu in enumerate(gpus):
        capability = gpu["compute_capability"]
        found = f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {capability}"
        if tuple(map(int, capability.split("."))) < LEAST_CAPABILITY:
            least = ".".join(map(str, LEAST_CAPABILITY))
            findings += unsuitable(f"gpu {index}", f"{found}; at least {least} is needed")
        else:
            findings += ok(f"gpu {index}", found)
    return findings


def check_links() -> list[Finding]:
    """What joins the GPUs, and whether they reach each other's memory."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return ok("links between gpus", f"{count} GPUs: nothing to link")
    pairs = list(itertools.combinations(range(count), 2))
    topology = machine.links(machine.nvidia_smi("topo", "-m") or "")
    kinds = sorted({topology.get(pair, "unknown") for pair in pairs})
    name = "links between gpus"
    with_nvlink = all(kind.startswith("NV") for kind in kinds)
    detail = f"{', '.join(kinds)} ({'NVLink' if with_nvlink else 'not all by NVLink'})"
    findings = ok(name, detail)
    if "unknown" in kinds:
        findings = unsuitable(name, "nvidia-smi topo -m does not tell; see P2P below")
    apart = [
        (a, b)
        for pair in pairs
        for a, b in (pair, pair[::-1])
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        shown = ", ".join(f"{a} -> {b}" for a, b in apart[:8])
        reason = f"GPUs cannot reach each other's memory: {shown}; transport cuda needs it"
        return findings + unsuitable("P2P", reason, "--sp-transport nccl works without")
    return findings + ok("P2P", f"all {count} GPUs reach each other's memory")


def check_nics() -> list[Finding]:
    """InfiniBand and RoCE devices, and network interfaces."""
    infiniband = [_infiniband(path) for path in _entries("/sys/class/infiniband")]
    interfaces = [_interface(path) for path in _entries("/sys/class/net") if path.name != "lo"]
    up = ", ".join(filter(None, interfaces)) or "none is up"
    if not infiniband:
        findings = missing(
            "nics for RDMA",
            "none; needed across machines only, where NCCL then takes TCP",
            "load the driver of the NIC (modprobe mlx5_ib, or the EFA installer)",
        )
    elif any("ACTIVE" in device for device in infiniband):
        findings = ok("nics for RDMA", ", ".join(infiniband))
    else:
        findings = unsuitable("nics for RDMA", f"no port is active: {', '.join(infiniband)}")
    return findings + ok("network interfaces", up)


def _entries(directory: str) -> list[Path]:
    path = Path(directory)
    return sorted(path.iterdir()) if path.is_dir() else []


def _infiniband(device: Path) -> str:
    ports = []
    for port in _entries(str(device / "ports")):
        state = _read(port / "state").partition(":")[2].strip() or "unknown"
        ports.append(f"{state} {_read(port / 'rate')}".strip())
    return f"{device.name} ({'; '.join(ports)})"


def _interface(device: Path) -> str | None:
    if _read(device / "operstate") not in ("up", "unknown"):
        return None
    speed = _read(device / "speed")
    return f"{device.name} ({speed} Mb/s)" if speed.isdecimal() else device.name


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def check_nccl() -> list[Finding]:
    version = machine.nccl_version() if torch.version.cuda else None
    if version is None:
        return missing("nccl", "this torch has none", "pip install torch, a build with CUDA")
    return ok("nccl", version)


def check_nvshmem() -> list[Finding]:
    cuda = (torch.version.cuda or "13").partition(".")[0]
    command = f"pip install nvshmem4py-cu{cuda}"
    if importlib.util.find_spec("nvshmem") is None:
        reason = "nvshmem4py is not installed; only transport nvshmem needs it"
        return missing("nvshmem", reason, command)
    if not torch.cuda.is_available():
        return unsuitable("nvshmem", f"nvshmem4py is installed; it {NO_GPU}")
    try:
        done = subprocess.run(
            [sys.executable, "-c", NVSHMEM_PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return unsuitable("nvshmem", f"importing it took longer than {PROBE_TIMEOUT_S} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return unsuitable("nvshmem", f"does not load: {last}", f"{command} --force-reinstall")
    python, _, library = done.stdout.strip().splitlines()[-1].partition("|")
    return ok("nvshmem", f"nvshmem4py {python}, library {library}")


def check_attention_kernels() -> list[Finding]:
    """Which local kernels import, and run on the first GPU."""
    from swiftfusion_xdit.attention import select_backend

    findings: list[Finding] = []
    for kernel in KERNELS:
        name = f"kernel {kernel}"
        if not torch.cuda.is_available():
            findings += unsuitable(name, NO_GPU)
            continue
        try:
            backend = select_backend(kernel, torch.device("cuda", 0))
        except ModuleNotFoundError as error:
            # The message ends with the command that installs the package.
            reason, _, command = str(error).partition(": ")
            findings += missing(name, reason, command)
        except (ImportError, NotImplementedError) as error:
            findings += unsuitable(name, str(error))
        else:
            lse = "with" if backend.has_lse else "without"
            findings += ok(name, f"{lse} log-sum-exp, head dims to {backend.max_head_dim}")
    return findings


def check_fused() -> list[Finding]:
    """Whether schedule fused has a kernel, for bfloat16 and head dim 128; compiles it."""
    from swiftfusion_xdit.attention import select_backend
    from swiftfusion_xdit.plan import FUSED_TILE_ROWS

    name = "schedule fused"
    if not torch.cuda.is_available():
        return unsuitable(name, NO_GPU)
    try:
        backend = select_backend("auto", torch.device("cuda", 0))
    except (ImportError, NotImplementedError) as error:
        return unsuitable(name, str(error).splitlines()[0])
    refusal = backend.not_fused_because(
        dtype=torch.bfloat16, head_dim=128, shared_by=1, tile_rows=FUSED_TILE_ROWS
    )
    if refusal:
        return unsuitable(name, f"{refusal}; layers are pipelined instead")
    return ok(name, f"{backend.name}'s kernel waits for peers itself")


def check_compiled_part() -> list[Finding]:
    """The library built from csrc/, and the compiler that would build it."""
    from swiftfusion_xdit import native
    from swiftfusion_xdit.native import build

    name = "compiled part"
    nvcc = build.find_nvcc()
    try:
        library = native.load()
    except native.NativeUnavailable as error:
        first = "" if nvcc else "install the CUDA toolkit, then "
        return missing(name, str(error), first + build.COMMAND)
    return ok(name, f"{library.path}; nvcc: {nvcc or 'none'}")


CUDA_CHECKS: tuple[Check, ...] = (
    check_driver,
    check_cuda,
    check_gpus,
    check_links,
    check_nics,
    check_nccl,
    check_nvshmem,
    check_attention_kernels,
    check_fused,
    check_compiled_part,
)
