"""Describes the cluster that a job runs on, from what each rank sees of its own machine.

A rank makes a ``Probe`` of its GPU and its machine's network: names and counts from CUDA,
nvidia-smi and sysfs, rates from copies of some milliseconds, cached. The caller gathers the
probes' words over its group, and ``describe`` makes the same cluster of them on every rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from swiftfusion_xdit.clusters import GBIT, GPUS, NETWORK_REACHED, NVLINK_REACHED
from swiftfusion_xdit.comm import driver
from swiftfusion_xdit.simulate.hardware import Cluster, Gpu, Link
from swiftfusion_xdit.topology import Topology

CACHE_VERSION = 3
SYSFS = Path("/sys/class")
COPY_BYTES = 64 * 2**20
COPY_REPEATS = 5
PUTS_AT_ONCE, PRODUCTS_BEFORE = 8, 5  # about a millisecond, for 16 calls of the host
PRODUCT_SIZE = 4096
# Network cards answer after this long: a put over RDMA that a proxy posts, a message over TCP.
RDMA_US, TCP_US = 10.0, 50.0
TCP_REACHED = 0.7
UNKNOWN_MBIT = 10_000  # where sysfs shows no network card
ATTENTION_OF_PRODUCTS = {64: 0.6, 128: 0.75}  # of an unknown GPU; what known ones reach
# An NVLink's rate depends on its generation; the count tells a switched machine from a bridge.
GB_PER_S_PER_NVLINK = 25.0
# Ranks on processors share cores and memory, so rates only say what is dear: to attend, to copy
# and, most of all, to cross between machines.
CPU = Gpu("cpu", 1, ((64, 0.05),), gemm_tflops=0.05, memory_gb_per_s=10.0, memory_gib=4.0)
CPU_INSIDE, CPU_ACROSS = Link(5.0, 20.0), Link(1.0, 50.0)


@dataclass(frozen=True)
class Probe:
    """What one rank sees. Whole numbers, so that a collective of integers carries it.

    ``gpu`` is an index into the known GPUs, -1 for an unknown one, -2 for a processor. ``inside``
    is the way to another GPU of the machine; 0 where none is visible. ``nvlinks`` is the least
    number of NVLinks between two GPUs of the machine. ``across`` is what the job's transport gets
    to another machine while all ranks send; 0 where it is not known.
    """

    gpu: int
    num_units: int = 0
    memory_mib: int = 0
    product_gflops: int = 0
    memory_mb_per_s: int = 0
    inside_mb_per_s: int = 0
    inside_ns: int = 0
    nvlinks: int = 0
    num_cards: int = 0
    network_mbit: int = 0
    is_rdma: int = 0
    across_mb_per_s: int = 0
    across_ns: int = 0

    def words(self) -> tuple[int, ...]:
        return dataclasses.astuple(self)

    @classmethod
    def from_words(cls, words: Sequence[int]) -> Probe:
        return cls(*words)


def probe(device: torch.device | str, *, machine_set: Sequence[Hashable] = ()) -> Probe:
    """Look at this rank's device and machine; measured once for each set of machines.

    Cards that do RDMA do not count in a job that is told to go by TCP (``NCCL_NET=Socket``).

    Args:
        machine_set: identities of the job's hosts: another set measures anew.
    """
    device = torch.device(device)
    goes_by_tcp = os.environ.get("NCCL_NET", "").lower() == "socket"
    cards, mbit, is_rdma = network_cards(SYSFS, rdma=not goes_by_tcp)
    if device.type != "cuda":
        return Probe(-2, num_cards=cards, network_mbit=mbit, is_rdma=is_rdma)
    index = torch.cuda.current_device() if device.index is None else device.index
    path = cache_path(index, machine_set)
    try:
        found = Probe(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        found = measure(index)
        _keep(found, path)
    return dataclasses.replace(found, num_cards=cards, network_mbit=mbit, is_rdma=is_rdma)


def _keep(found: Probe, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
        draft.replace(path)
    except OSError:
        pass  # a read-only home: the next start measures again


def cache_path(index: int, machine_set: Sequence[Hashable]) -> Path:
    """Where the probe of GPU ``index`` of this host is kept, for a job on these machines."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    hosts = sorted({str(host) for host in machine_set})
    key = [CACHE_VERSION, socket.gethostname(), hosts, index, torch.__version__]
    key += [torch.cuda.get_device_name(index), os.environ.get("CUDA_VISIBLE_DEVICES", "")]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
    return Path(home) / "swiftfusion_xdit" / "machines" / f"{digest}.json"


def measure(index: int) -> Probe:
    """Rates of GPU ``index``, by copies and products of some milliseconds.

    All ranks measure at once. Copies to a peer therefore take nothing of it but its memory: were
    they torch's own, which order themselves with a stream of the peer too, this process would take
    turns with the peer's own on that GPU, milliseconds a copy.
    """
    properties = torch.cuda.get_device_properties(index)
    here, peer = torch.device("cuda", index), _peer_of(index)
    with torch.cuda.device(here):
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=here)
        memory_us = _time_us(lambda: source.clone())
        a = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device=here)
        product_us = _time_us(lambda: a @ a)
        inside_mb_per_s, inside_ns = 0, 0
        if peer is not None:
            target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=peer)
            target.copy_(source)  # torch opens the way
            torch.cuda.synchronize(here)

            def products() -> None:
                for _ in range(PRODUCTS_BEFORE):
                    a @ a

            def put_us(num_bytes: int) -> float:
                """One of several in a row that products hold back until all are enqueued."""
                put = partial(_put, source, target, num_bytes)
                return _time_us(put, times=PUTS_AT_ONCE, before=products)

            large_us, small_us = put_us(COPY_BYTES), put_us(COPY_BYTES // 64)
            # Two sizes give rate and latency.
            rate = COPY_BYTES * 63 / 64 / max(large_us - small_us, 1e-3)
            inside_mb_per_s = round(rate)
            inside_ns = max(0, round(1e3 * (large_us - COPY_BYTES / rate)))
    return Probe(
        gpu=gpu_index(properties.name),
        num_units=properties.multi_processor_count,
        memory_mib=properties.total_memory // 2**20,
        product_gflops=round(2 * PRODUCT_SIZE**3 / product_us / 1e3),
        memory_mb_per_s=round(2 * COPY_BYTES / memory_us),
        inside_mb_per_s=inside_mb_per_s,
        inside_ns=inside_ns,
        nvlinks=least_nvlinks(_nvidia_smi_topology()),
    )


def _put(source: torch.Tensor, target: torch.Tensor, num_bytes: int) -> None:
    """A copy, then a flag, on the source's stream alone."""
    stream = torch.cuda.current_stream(source.device).cuda_stream
    shape = driver.copy_shape((num_bytes,), (1,), (1,), 1)
    driver.load().copy(stream, target.data_ptr(), source.data_ptr(), shape)
    driver.load().write32(stream, target.data_ptr(), 1)


def gpu_index(name: str) -> int:
    """The known GPU of that name, as CUDA spells it; -1 if there is none."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((i for i, known in enumerate(GPUS) if known in words), -1)


def least_nvlinks(topology: str) -> int:
    """The least number of NVLinks between two GPUs, from what ``nvidia-smi topo -m`` prints."""
    rows = re.findall(r"^GPU\d+\s.*$", re.sub(r"\x1b\[[0-9;]*m", "", topology), re.MULTILINE)
    rows = [words for words in map(str.split, rows) if not words[1].startswith("GPU")]
    pairs = [word for row in rows for word in row[1 : len(rows) + 1] if word != "X"]
    counts = [int(word[2:]) if re.fullmatch(r"NV\d+", word) else 0 for word in pairs]
    return min(counts, default=0)


def network_cards(root: Path = SYSFS, *, rdma: bool = True) -> tuple[int, int, int]:
    """Number of cards that are up, their Mbit/s in all, and 1 if they do RDMA (InfiniBand, EFA).

    Ethernet counts only where there is no RDMA, or where it is not to count: its cards would be
    the same ones twice.
    """
    rates = []
    for port in sorted(root.glob("infiniband/*/ports/*")) if rdma else ():
        found = re.match(r"([\d.]+) Gb/sec", _text(port / "rate"))
        if found and "ACTIVE" in _text(port / "state"):
            rates.append(round(1000 * float(found.group(1))))
    if rates:
        return len(rates), sum(rates), 1
    for card in sorted(root.glob("net/*")):
        speed = _text(card / "speed")
        is_up = (card / "device").exists() and _text(card / "operstate") == "up"
        if is_up and speed.isdecimal():
            rates.append(int(speed))
    return len(rates), sum(rates), 0


def describe(probes: Sequence[Probe], topology: Topology) -> Cluster:
    """The cluster of these ranks: of each rate the least, as a layer waits for its slowest rank.

    Raises:
        ValueError: machines hold different numbers of ranks, or not one probe for each rank.
    """
    if len(probes) != topology.num_ranks or not topology.is_even:
        raise ValueError(
            f"a cluster needs equal machines and a probe for each rank, got {len(probes)} probes "
            f"for {topology.machine_of}"
        )
    per_machine = topology.num_ranks // topology.num_machines
    least = Probe(*(min(column) for column in zip(*(p.words() for p in probes), strict=True)))
    if least.gpu == -2:
        return Cluster("cpu", CPU, topology.num_machines, per_machine, CPU_INSIDE, CPU_ACROSS)
    alike = len({p.gpu for p in probes}) == 1
    gpu = _known_gpu(least) if alike and least.gpu >= 0 else _unknown_gpu(least)
    across, per_gpu = _across(least, per_machine)
    return Cluster(
        f"detected {gpu.name}",
        gpu,
        topology.num_machines,
        per_machine,
        _inside(least, gpu),
        across,
        across_gb_per_s_per_gpu=per_gpu,
    )


def _known_gpu(least: Probe) -> Gpu:
    """A known GPU, with what was seen of this one; its attention rates are published."""
    known = list(GPUS.values())[least.gpu]
    return dataclasses.replace(
        known,
        num_units=least.num_units or known.num_units,
        memory_gib=(least.memory_mib or known.memory_gib * 1024) / 1024,
        memory_gb_per_s=least.memory_mb_per_s / 1e3 or known.memory_gb_per_s,
    )


def _unknown_gpu(least: Probe) -> Gpu:
    products = max(least.product_gflops, 1) / 1e3
    rates = tuple((dim, share * products) for dim, share in ATTENTION_OF_PRODUCTS.items())
    return Gpu(
        "gpu",
        max(least.num_units, 1),
        rates,
        gemm_tflops=products,
        memory_gb_per_s=max(least.memory_mb_per_s, 1) / 1e3,
        memory_gib=max(least.memory_mib, 1) / 1024,
    )


def _inside(least: Probe, gpu: Gpu) -> Link:
    """As measured; where no peer is visible, by the NVLinks; else as host memory would carry it."""
    if least.inside_mb_per_s:
        return Link(least.inside_mb_per_s / 1e3, least.inside_ns / 1e3)
    if least.nvlinks:
        return Link(least.nvlinks * GB_PER_S_PER_NVLINK * NVLINK_REACHED, 5.0)
    return Link(min(12.0, gpu.memory_gb_per_s), 15.0)


def _across(least: Probe, gpus_per_machine: int) -> tuple[Link, float | None]:
    """A machine's path, and what a GPU alone can get of it: as measured, else by its cards."""
    latency_us = RDMA_US if least.is_rdma else TCP_US
    if least.across_mb_per_s:
        per_gpu = least.across_mb_per_s / 1e3
        return Link(per_gpu * gpus_per_machine, least.across_ns / 1e3 or latency_us), None
    mbit = least.network_mbit or UNKNOWN_MBIT
    reached = NETWORK_REACHED if least.is_rdma else TCP_REACHED
    whole = mbit / 1e3 * GBIT * reached
    if not least.is_rdma or least.num_cards < 2:
        return Link(whole, latency_us), None
    # A GPU uses the cards next to it: its share of them, or the one that it shares.
    cards_per_gpu = max(1, least.num_cards // gpus_per_machine)
    return Link(whole, latency_us), whole * cards_per_gpu / least.num_cards


def _peer_of(index: int) -> torch.device | None:
    for step in range(1, torch.cuda.device_count()):
        peer = (index + step) % torch.cuda.device_count()
        if torch.cuda.can_device_access_peer(index, peer):
            return torch.device("cuda", peer)
    return None


def _time_us(
    work: Callable[[], object], *, times: int = 1, before: Callable[[], object] = lambda: None
) -> float:
    """One ``work`` of so many in a row, in the fastest of some runs, by events on the stream.

    ``before``: keeps the GPU at work, uncounted, while the host enqueues the rest.
    """
    work()
    found = []
    for _ in range(COPY_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / times)
    return max(min(found), 1e-3)


def _nvidia_smi_topology() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, "topo", "-m"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # a card that is down has no speed
        return ""
