"""How far off is attention with fp8 on the wire, and how many bytes does it save?

    python -m benchmarks.wire_error [--json benchmarks/results/wire_fp8.json]

One layer on CPU ranks for every mesh and schedule, exact and with fp8 on the wire, on inputs of
several kinds, against attention in fp64 on the same inputs. Nothing is timed, so a busy machine
does not change the numbers.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import environment, provenance
from swiftfusion_xdit import SequenceParallel
from swiftfusion_xdit.attention.reference import reference_attention, relative_error
from swiftfusion_xdit.cli.bench_report import write_json
from swiftfusion_xdit.mesh import Mesh
from tests.distributed import RankPool

METHOD = {
    "error": "||out - ref|| / ||ref|| of a rank's rows, the worst rank of the worst seed.",
    "score_std": "Standard deviation of the scaled scores of a query over its keys, mean.",
    "bytes": "What fp8 sends in a layer over what exact sends, all ranks, counted at the puts.",
}
NUM_OUTLIERS = 4  # channels of a head
WAYS = (
    ("torus", Mesh(2, 1, 2)),
    ("folded", Mesh(2, 1, 2)),
    ("pipelined", Mesh(2, 2, 1)),
    ("torus", Mesh(4, 1, 1)),
    ("torus", Mesh(1, 1, 4)),
)
HEADINGS = ("inputs", "dtype", "schedule", "T x U x R", "exact", "fp8", "bytes")


def normal(q: Tensor, k: Tensor, v: Tensor) -> None:
    """All N(0, 1)."""


def outlier_channels(q: Tensor, k: Tensor, v: Tensor) -> None:
    """4 channels of k and v 30 times as large, those of q 30 times as small: the same scores."""
    k[..., :NUM_OUTLIERS] *= 30
    v[..., :NUM_OUTLIERS] *= 30
    q[..., :NUM_OUTLIERS] /= 30


def shared_offset(q: Tensor, k: Tensor, v: Tensor) -> None:
    """10 added to 4 channels of all keys, which softmax cancels: only its rounding remains."""
    k[..., :NUM_OUTLIERS] += 10


def outlier_scores(q: Tensor, k: Tensor, v: Tensor) -> None:
    """4 channels of q and k 4 times as large: scores that a few keys dominate."""
    q[..., :NUM_OUTLIERS] *= 4
    k[..., :NUM_OUTLIERS] *= 4


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "normal": normal,
    "outlier channels": outlier_channels,
    "shared offset": shared_offset,
    "outlier scores": outlier_scores,
}


@dataclass(frozen=True)
class Settings:
    """One layer; each of 4 ranks brings ``seq`` / 4 rows."""

    seq: int
    heads: int
    head_dim: int
    seeds: int
    kind: str = "normal"
    dtype: str = "bfloat16"

    def inputs(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, self.seq, self.heads, self.head_dim)
        whole = [torch.randn(shape, generator=generator) for _ in range(3)]
        KINDS[self.kind](*whole)
        return [x.to(getattr(torch, self.dtype)) for x in whole]


def measure(rank: int, world_size: int, settings: Settings) -> dict[str, Any]:
    """Errors and bytes of this rank, by wire and by way."""
    expected, inputs, score_std = [], [], 0.0
    for seed in range(settings.seeds):
        whole = settings.inputs(seed)
        mine = [x.chunk(world_size, dim=1)[rank] for x in whole]
        expected.append(reference_attention(mine[0], *whole[1:]))
        inputs.append(mine)
        scores = torch.einsum("bshd,bthd->bhst", mine[0].double()[:, :64], whole[1].double())
        deviation = scores.std(dim=-1).mean() / settings.head_dim**0.5
        score_std += float(deviation) / settings.seeds
    found: dict[str, Any] = {"score_std": score_std}
    for wire in ("exact", "fp8"):
        for way, (schedule, mesh) in enumerate(WAYS):
            with SequenceParallel(machines=2, mesh=mesh, schedule=schedule, wire=wire) as sp:
                errors = [
                    relative_error(sp.attention(*mine), ref)
                    for mine, ref in zip(inputs, expected, strict=True)
                ]
                stats = sp.stats()
            sent = stats["same_machine"]["bytes"] + stats["across_machines"]["bytes"]
            found[f"{wire} {way}"] = (max(errors), sent)
    return found


def run(pool: RankPool, settings: Settings, timeout_s: float) -> list[dict[str, Any]]:
    """One row for each way."""
    ranks = pool.run(measure, settings, timeout_s=timeout_s)
    rows = []
    for way, (schedule, mesh) in enumerate(WAYS):
        errors, sent = {}, {}
        for wire in ("exact", "fp8"):
            results = [rank[f"{wire} {way}"] for rank in ranks]
            errors[wire] = max(error for error, _ in results)
            sent[wire] = sum(num_bytes for _, num_bytes in results)
        rows.append(
            {
                "inputs": settings.kind,
                "dtype": settings.dtype,
                "schedule": schedule,
                "mesh": mesh.as_dict(),
                "score_std": round(ranks[0]["score_std"], 2),
                "error": {wire: float(f"{error:.3g}") for wire, error in errors.items()},
                "bytes": round(sent["fp8"] / sent["exact"], 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wire_error", description=(__doc__ or "").splitlines()[0]
    )
    for name, default, text in (
        ("seq", 1024, "rows of the whole sequence, a multiple of 4"),
        ("heads", 8, "attention heads"),
        ("head-dim", 128, "elements of a head"),
        ("seeds", 3, "draws of each kind of inputs"),
        ("timeout", 600, "seconds after which a run is given up"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default {default})"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    arguments = vars(parser.parse_args())
    path, timeout_s = arguments.pop("json"), arguments.pop("timeout")
    os.environ.update(CUDA_VISIBLE_DEVICES="", LOG_LEVEL="error")
    base, rows = Settings(**arguments), []
    with RankPool(4) as pool:
        for kind in KINDS:
            for dtype in ("float32", "bfloat16"):
                rows += run(pool, replace(base, kind=kind, dtype=dtype), timeout_s)
    show(rows)
    if path:
        report = {
            **provenance("wire_error", __doc__),
            **environment(),
            "settings": {name: asdict(base)[name] for name in arguments},
            "method": METHOD,
            "inputs": {name: kind.__doc__ for name, kind in KINDS.items()},
            "results": rows,
        }
        write_json(path, report)


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*HEADINGS, title=(__doc__ or "").splitlines()[0])
    for row in rows:
        mesh = " x ".join(map(str, row["mesh"].values()))
        exact, fp8 = (f"{row['error'][wire]:.1e}" for wire in ("exact", "fp8"))
        table.add_row(
            f"{row['inputs']} (scores {row['score_std']})",
            *(row["dtype"], row["schedule"], mesh, exact, fp8, f"{row['bytes']:.3f}"),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
