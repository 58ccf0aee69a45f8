"""Clusters by name and from YAML files: what they are made of, with the source of each number.

Sources, by the letter that follows a number:

    [D] NVIDIA's data sheets: A100 80 GB SXM, H100 SXM, H200 SXM, L40, GB200 NVL72, DGX H200
    [A] Amazon EC2's tables of accelerated instances: p4de.24xlarge, p5.48xlarge
    [M] this project's measurements on two H200 of one host (docs/planner.md)
    [F2] FlashAttention-2 (arXiv 2307.08691), forward without mask at 16k rows
    [F3] FlashAttention-3 (arXiv 2407.08608), the same
    [F4] FlashAttention-4 (arXiv 2603.05451), B200
    [G] best matrix product that mamf-finder (stas00/ml-engineering) found on that GPU
    [N] NVIDIA/nccl issue 1264: p2pBandwidthLatencyTest reaches 380 of H100's 450 GB/s
    [P] Perplexity on p5.48xlarge: 3108 of 3200 Gbit/s between GPUs over EFA
    [X] xDiT (arXiv 2411.01738): its cluster of 8 L40 a machine on 100 Gbit/s Ethernet

Where nobody published a number, the comment says how it is derived.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftfusion_xdit.simulate.hardware import Cluster, Gpu, Link

SUSTAINED = 0.85  # of the best matrix product [G]: an average over a model's shapes at full power
STREAMED = 0.88  # of the data sheet's memory bandwidth: what a copy kernel reaches
NVLINK_REACHED = 0.867  # 390 of 450 GB/s a direction: copies to a peer on H200 [M], and [N]
NETWORK_REACHED = 0.97  # [P]
GBIT = 1 / 8  # GB

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100",
            num_units=108,  # [D]
            attention_tflops=((64, 190.0), (128, 225.0)),  # [F2], read off its figure
            gemm_tflops=268 * SUSTAINED,  # [G]; the data sheet's peak is 312
            memory_gb_per_s=2039 * STREAMED,  # [D]
            memory_gib=80e9 / 2**30,  # [D]
        ),
        Gpu(
            name="h100",
            num_units=132,  # [D]
            attention_tflops=((64, 497.0), (128, 648.0)),  # [F3]
            gemm_tflops=821 * SUSTAINED,  # [G]; peak 989
            memory_gb_per_s=3350 * STREAMED,  # [D]
            memory_gib=80e9 / 2**30,  # [D]
        ),
        Gpu(
            name="h200",
            num_units=132,  # [D]
            attention_tflops=((64, 545.0), (128, 680.0)),  # [M], FlashAttention-4, 17k to 76k rows
            gemm_tflops=821 * SUSTAINED,  # [G] of H100: the same chip with other memory
            memory_gb_per_s=4800 * STREAMED,  # [D]
            memory_gib=141e9 / 2**30,  # [D]
        ),
        Gpu(
            name="l40",
            num_units=142,  # [D]
            # [F2] reaches 0.61 and 0.72 of A100's peak; here of 181 TFLOP/s [D].
            attention_tflops=((64, 110.0), (128, 130.0)),
            gemm_tflops=170 * SUSTAINED,  # [G]
            memory_gb_per_s=864 * STREAMED,  # [D]
            memory_gib=48e9 / 2**30,  # [D]
        ),
        Gpu(
            name="gb200",
            num_units=148,  # [D]
            # [F4] at 128. At 64 the exponentials bound it: one for 256 FLOP, 16 a cycle and unit.
            attention_tflops=((64, 1100.0), (128, 1613.0)),
            gemm_tflops=2500 * 0.78 * SUSTAINED,  # peak [D]; 0.78: what [G] reaches of B200's
            memory_gb_per_s=8000 * STREAMED,  # [D]
            memory_gib=186e9 / 2**30,  # [D]
        ),
    )
}

PRESETS: dict[str, Cluster] = {
    cluster.name: cluster
    for cluster in (
        Cluster(
            name="p4de",
            gpu=GPUS["a100"],
            num_machines=4,  # the paper's evaluation
            gpus_per_machine=8,
            # NVSwitch, 300 GB/s a direction [D]. Latency as measured on H200 [M].
            inside=Link(300 * NVLINK_REACHED, 5.0),
            # EFA, 400 Gbit/s a machine in 4 cards [A]. First-generation EFA has no remote write
            # in hardware: 25 us, twice what the second generation takes.
            across=Link(400 * GBIT * NETWORK_REACHED, 25.0),
            across_gb_per_s_per_gpu=100 * GBIT * NETWORK_REACHED,  # the card at its PCIe switch
        ),
        Cluster(
            name="p5",
            gpu=GPUS["h100"],
            num_machines=4,
            gpus_per_machine=8,
            inside=Link(450 * NVLINK_REACHED, 5.0),  # [D], [N]
            across=Link(3200 * GBIT * NETWORK_REACHED, 13.0),  # [A]
            across_gb_per_s_per_gpu=400 * GBIT * NETWORK_REACHED,  # 4 of 32 cards [A]
        ),
        Cluster(
            name="h200-2",
            gpu=GPUS["h200"],
            num_machines=1,
            gpus_per_machine=2,
            inside=Link(390.0, 5.0),  # [M]: 1 MiB 123, 4 MiB 286, 16 MiB 355, 64 MiB 383 GB/s
            across=Link(5.8, 50.0),  # [M]: one box as two machines, NCCL over TCP
        ),
        Cluster(
            name="h200-8",
            gpu=GPUS["h200"],
            num_machines=1,
            gpus_per_machine=8,
            inside=Link(390.0, 5.0),  # [M]
            # DGX H200: 8 cards of 400 Gbit/s InfiniBand [D]; a put that a proxy posts takes 10 us.
            across=Link(8 * 400 * GBIT * NETWORK_REACHED, 10.0),
            across_gb_per_s_per_gpu=400 * GBIT * NETWORK_REACHED,
        ),
        Cluster(
            name="l40-pcie",
            gpu=GPUS["l40"],
            num_machines=2,  # [X]
            gpus_per_machine=8,
            # PCIe 4.0 x16: 31.5 GB/s after line coding, less the headers of 256-byte packets.
            inside=Link(26.0, 10.0),
            across=Link(100 * GBIT * NETWORK_REACHED, 30.0),  # [X]
        ),
        Cluster(
            name="gb200-nvl72",
            gpu=GPUS["gb200"],
            num_machines=1,  # one NVLink domain is one machine
            gpus_per_machine=72,
            inside=Link(900 * NVLINK_REACHED, 5.0),  # [D]
            across=Link(72 * 400 * GBIT * NETWORK_REACHED, 10.0),  # a 400 Gbit/s card a GPU [D]
            across_gb_per_s_per_gpu=400 * GBIT * NETWORK_REACHED,
        ),
    )
}
ALIASES = {"h100": "p5"}
HOME = {"a100": "p4de", "h100": "p5", "h200": "h200-8", "l40": "l40-pcie", "gb200": "gb200-nvl72"}

PARTS: dict[str, type] = {"gpu": Gpu, "inside": Link, "across": Link}


def preset(
    name: str, *, num_machines: int | None = None, gpus_per_machine: int | None = None
) -> Cluster:
    """A preset, with other numbers of machines or GPUs where given.

    What machines share, their path to each other, stays as it is when they hold fewer GPUs.

    Raises:
        ValueError: an unknown name, or numbers that are not positive integers.
    """
    known = sorted({*PRESETS, *ALIASES})
    found = PRESETS.get(ALIASES.get(name, name))
    if found is None:
        raise ValueError(f"topology must be one of {', '.join(known)} or a YAML file, got {name!r}")
    return resize(found, num_machines=num_machines, gpus_per_machine=gpus_per_machine)


def home_of(gpu: str) -> str:
    """The preset whose machines hold this GPU.

    Raises:
        ValueError: an unknown GPU.
    """
    if gpu not in HOME:
        raise ValueError(f"gpu must be one of {', '.join(sorted(HOME))}, got {gpu!r}")
    return HOME[gpu]


def resize(
    cluster: Cluster, *, num_machines: int | None = None, gpus_per_machine: int | None = None
) -> Cluster:
    """The cluster with other numbers of machines or GPUs; None keeps a number."""
    numbers = {"num_machines": num_machines, "gpus_per_machine": gpus_per_machine}
    given = {name: number for name, number in numbers.items() if number is not None}
    for name, number in given.items():
        _require_count(f"cluster {cluster.name}", name, number)
    return dataclasses.replace(cluster, **given) if given else cluster  # type: ignore[arg-type]


def load(text: str) -> Cluster:
    """A preset by its name, or the cluster of a YAML file.

    Raises:
        ValueError: no preset and no file of that name, or a file that describes no cluster.
    """
    is_file = text.endswith((".yaml", ".yml")) or "/" in text
    return from_yaml(Path(text)) if is_file else preset(text)


def from_yaml(path: str | Path) -> Cluster:
    """Read a cluster: the fields of ``Cluster`` by name, ``gpu`` by name or with its own fields.

    ``preset: p4de`` fills in what is left out::

        preset: p4de
        num_machines: 3
        across: {gb_per_s: 48.5, latency_us: 25}

    Raises:
        ValueError: unreadable, a key that does not exist, a missing one, or a value that its key
            cannot have; the message names the file, the key and what it allows.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"topology {path} cannot be read: {error}") from None
    try:
        return from_mapping(content, default_name=Path(path).stem)
    except ValueError as error:
        raise ValueError(f"topology {path}: {error}") from None


def from_mapping(content: Any, *, default_name: str) -> Cluster:
    """The cluster that a file's content describes; see ``from_yaml``."""
    values = dict(_require_mapping("the top level", content))
    base = None
    if "preset" in values:
        name = values.pop("preset")
        base = preset(name if isinstance(name, str) else repr(name))
    values.setdefault("name", default_name)
    return _build(Cluster, values, "the top level", base=base, also=("preset",))


def _build(
    kind: type, content: Any, where: str, *, base: Any = None, also: tuple[str, ...] = ()
) -> Any:
    """A ``kind`` from its fields by name; fields left out are those of ``base``."""
    values = dict(_require_mapping(where, content))
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            allowed = ", ".join([*fields, *also])
            raise ValueError(f"{where} has an unknown key {key!r}; allowed are {allowed}")
    for key, value in values.items():
        part = PARTS.get(key) if kind is Cluster else None
        if part is Gpu and isinstance(value, str):
            values[key] = GPUS[_require_gpu(value)]
        elif part is not None and value is not None:
            values[key] = _build(part, value, key, base=base and getattr(base, key))
        elif key == "attention_tflops":
            values[key] = _attention_rates(value)
        elif key.startswith("num_") or key == "gpus_per_machine":
            _require_count(where, key, value)
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing and base is None:
        raise ValueError(f"{where} misses {', '.join(missing)}; needed are {', '.join(required)}")
    try:
        return kind(**values) if base is None else dataclasses.replace(base, **values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _require_mapping(where: str, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values, got {content!r}")
    return content


def _require_gpu(name: str) -> str:
    if name not in GPUS:
        known = ", ".join(sorted(GPUS))
        raise ValueError(f"gpu must be one of {known}, or a mapping of its numbers, got {name!r}")
    return name


def _require_count(where: str, key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {key} must be a positive integer, got {value!r}")


def _attention_rates(value: Any) -> tuple[tuple[int, float], ...]:
    """``{64: 190, 128: 225}``: TFLOP/s by head dim."""
    rates = _require_mapping("attention_tflops", value)
    for head_dim in rates:
        _require_count("attention_tflops", "a head dim", head_dim)
    return tuple(sorted((int(head_dim), tflops) for head_dim, tflops in rates.items()))
