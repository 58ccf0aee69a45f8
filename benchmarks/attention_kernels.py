"""How fast is each attention kernel on this GPU, and what does calling it cost the host?

    python -m benchmarks.attention_kernels [--json benchmarks/results/attention_kernels.json]

All backends that are installed, in turn in one run, on the shapes that one of `--ranks` ranks
attends (its share of the heads, the whole sequence). Every result is checked against attention in
fp64 before it is timed. Needs no xDiT.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import environment, provenance
from swiftfusion_xdit.attention import Backend, attend, select_backend
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from swiftfusion_xdit.cli.bench_report import write_json

METHOD = {
    "ms": "Time between two CUDA events around one call, both in the queue before the GPU gets to "
    "the first: the GPU's time, without the host's. Quartiles over --rounds rounds in which the "
    "backends take turns. Each round takes the next of three sets of inputs.",
    "graph_ms": "The same for a replay of a CUDA graph that holds one call.",
    "host_us": "Time until the call returns, with nothing queued before it; median.",
    "tflops": "4 S^2 D H B floating-point operations over ms.",
    "error": "||out - ref|| / ||ref|| over some 64 rows from all over the sequence, ref in fp64.",
    "lse_error": "The largest difference of an lse in these rows.",
}
BACKENDS = ("fa4", "fa3", "cudnn", "fa2", "sdpa_flash")
# Name: rows, heads, head dim.
SHAPES = {
    "flux1024": (4608, 24, 128),
    "flux2048": (16896, 24, 128),
    "flux3072": (37376, 24, 128),
    "cogvideox": (17776, 48, 64),
    "wan480": (32760, 40, 128),
    "wan720": (75600, 40, 128),
}
NUM_INPUTS = 3
CHECKED_ROWS = 64
MAX_ERROR = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
MAX_LSE_ERROR = 1e-3
WARM_UPS = 3
# Longer than a call takes on the host: about 0.5 ms.
HEAD_START_CYCLES = 1_000_000
HOST_CALLS = 20

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass
class Contender:
    """One backend at one shape, ready to be called on the input set of an index."""

    backend: Backend
    run: Callable[[int], tuple[Tensor, Tensor]]
    graphs: list[torch.cuda.CUDAGraph]
    eager_ms: list[float]
    graph_ms: list[float]


def main() -> None:
    args = parse_args()
    device = torch.device("cuda", args.device)
    torch.cuda.set_device(device)
    backends, absent = available(args.backends, device)
    if not backends:
        raise SystemExit("no attention backend:\n" + "\n".join(absent.values()))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    results = []
    for shape in args.shapes:
        results += measure(shape, backends, args, dtype, device)
    print_table(results, device, args)
    for reason in absent.values():
        print(f"not measured: {reason}")
    if args.json is not None:
        report = {**provenance("attention_kernels", __doc__), **environment(), "method": METHOD}
        report |= {"options": vars(args) | {"json": None}, "not_measured": absent}
        write_json(args.json, report | {"results": results})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda known: lambda text: choose(text, known)  # noqa: E731
    parser.add_argument("--shapes", type=names(SHAPES), default=["flux1024", "flux2048"])
    parser.add_argument("--backends", type=names(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--ranks", type=int, default=2, help="heads are shared among so many")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def choose(text: str, known: Any) -> list[str]:
    chosen = text.split(",")
    if not set(chosen) <= set(known):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(known)}; got {text}")
    return chosen


def available(names: list[str], device: torch.device) -> tuple[list[Backend], dict[str, str]]:
    """The backends that can be used, and why the others cannot."""
    backends, absent = [], {}
    for name in names:
        try:
            backends.append(select_backend(name, device))
        except (ImportError, NotImplementedError) as error:
            absent[name] = str(error)
    return backends, absent


def measure(
    shape: str,
    backends: list[Backend],
    args: argparse.Namespace,
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Check, then time all backends in turn at one shape."""
    rows, heads, head_dim = SHAPES[shape]
    size = (args.batch, rows, heads // args.ranks, head_dim)
    rng = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(size, generator=rng, device=device).to(dtype)

    inputs: list[Inputs] = [(random(), random(), random()) for _ in range(NUM_INPUTS)]
    contenders, results = [], []
    for backend in backends:
        contender = make_contender(backend, inputs)
        error, lse_error = check(contender, inputs[0], MAX_ERROR[dtype])
        contenders.append(contender)
        results.append({"shape": shape, "size": size, "backend": backend.name, "error": error})
        results[-1]["lse_error"] = lse_error
    for turn in range(args.rounds):
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            which = turn % NUM_INPUTS
            contender.eager_ms.append(elapsed_ms(lambda c=contender, i=which: c.run(i)))
            contender.graph_ms.append(elapsed_ms(contender.graphs[which].replay))
    for contender, result in zip(contenders, results, strict=True):
        result["ms"] = quartiles(contender.eager_ms)
        result["graph_ms"] = quartiles(contender.graph_ms)
        result["host_us"] = host_us(contender)
        flops = 4 * args.batch * rows**2 * size[2] * head_dim
        result["tflops"] = flops / result["ms"][1] / 1e9
    return results


def make_contender(backend: Backend, inputs: list[Inputs]) -> Contender:
    """Warm a backend up, so that it compiles and builds what it needs, and capture its graphs."""
    scale = inputs[0][0].shape[3] ** -0.5

    def run(index: int) -> tuple[Tensor, Tensor]:
        return attend(*inputs[index], scale=scale, backend=backend)

    for _ in range(WARM_UPS):
        run(0)
    torch.cuda.synchronize()
    graphs = []
    for index in range(len(inputs)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(index)
        graphs.append(graph)
    return Contender(backend, run, graphs, [], [])


def check(contender: Contender, inputs: Inputs, max_error: float) -> tuple[float, float]:
    q, k, v = inputs
    out, lse = contender.run(0)
    step = max(1, q.shape[1] // CHECKED_ROWS)
    rows = q[:, ::step]
    scale = q.shape[3] ** -0.5
    error = relative_error(out[:, ::step], reference_attention(rows, k, v, scale=scale))
    scores = scale * torch.einsum("bshd,bthd->bhst", rows.double(), k.double())
    lse_error = (lse[:, :, ::step] - torch.logsumexp(scores, dim=-1)).abs().max().item()
    if error > max_error or not lse_error <= MAX_LSE_ERROR:
        raise SystemExit(
            f"{contender.backend.name} at {tuple(q.shape)}: error {error:.2e} (at most "
            f"{max_error:.0e}), lse error {lse_error:.2e} (at most {MAX_LSE_ERROR:.0e})"
        )
    return error, lse_error


def elapsed_ms(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_us(contender: Contender) -> float:
    samples = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        contender.run(0)
        samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples)


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def print_table(
    results: list[dict[str, Any]], device: torch.device, args: argparse.Namespace
) -> None:
    print(
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {args.dtype}, batch "
        f"{args.batch}, heads of one of {args.ranks} ranks; medians of {args.rounds} rounds"
    )
    print(
        f"{'shape':<10} {'backend':<10} {'ms':>8} {'quartiles':>17} {'graph ms':>8} "
        f"{'TFLOP/s':>7} {'host us':>7} {'error':>8} {'lse':>8}"
    )
    for r in results:
        low, middle, high = r["ms"]
        print(
            f"{r['shape']:<10} {r['backend']:<10} {middle:8.3f} {low:8.3f} {high:8.3f} "
            f"{r['graph_ms'][1]:8.3f} {r['tflops']:7.0f} {r['host_us']:7.0f} "
            f"{r['error']:8.1e} {r['lse_error']:8.1e}"
        )


if __name__ == "__main__":
    main()
