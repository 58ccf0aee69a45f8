"""Where does the planner leave the paper's rule, and what does that gain in simulation?

    python benchmarks/planner_against_rule.py > benchmarks/results/planner_against_rule.md

Rule: `P_u = gcd(N * M, H)`, Ulysses across machines and Ring inside, Torus Attention. `gain` is the
rule's step over the planned one's. `missed` is what the quick search at run time leaves on the
table: its layer over the best of all candidates.
"""

from __future__ import annotations

import time

from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.planner import Choice, Prediction, plan
from swiftfusion_xdit.simulate.hardware import Cluster
from swiftfusion_xdit.simulate.models import Model, model_named
from swiftfusion_xdit.simulate.sizes import LayerShape
from swiftfusion_xdit.simulate.step import rest_us

CLUSTERS = (
    ("p4de", 2), ("p4de", 3), ("p4de", 4), ("p5", 4), ("h200-2", 1), ("h200-8", 1),
    ("h200-8", 3), ("l40-pcie", 2),
)  # fmt: skip
WORKLOADS = (
    ("FLUX 1024", "flux", (1024, 1024), 0),
    ("FLUX 3072", "flux", (3072, 3072), 0),
    ("FLUX 4096", "flux", (4096, 4096), 0),
    ("CogVideoX 20 s", "cogvideox-5b", (768, 1360), 20),
    ("CogVideoX 40 s", "cogvideox-5b", (768, 1360), 40),
    ("Wan 14B 720p", "wan2.1-14b", (720, 1280), 5),
)


def rows_of(model: Model, size: tuple[int, int], seconds: float) -> int:
    return model.sequence(*size, model.frames_of(seconds) if seconds else 1)


def step_ms(model: Model, cluster: Cluster, shape: LayerShape, found: Prediction) -> float:
    rest = rest_us(model, cluster, max(shape.query_lengths))
    return model.num_layers * (found.layer_us + rest) / 1e3


def short(choice: Choice) -> str:
    mesh = choice.mesh
    groups = f" x {choice.groups_per_rank}" if choice.groups_per_rank > 1 else ""
    return f"{mesh.torus} x {mesh.ulysses} x {mesh.ring} {choice.schedule}{groups}"


def main() -> None:
    print("| cluster | workload | rule: T x U x R | step ms | planned | step ms | gain | missed |")
    print("|---|---|---|---|---|---|---|---|")
    gains, seconds = [], []
    for name, num_machines in CLUSTERS:
        cluster = preset(name, num_machines=num_machines)
        for workload, model_name, size, length in WORKLOADS:
            model = model_named(model_name)
            shape = LayerShape.even(
                cluster.num_ranks,
                sequence=rows_of(model, size, length),
                num_heads=model.num_heads,
                head_dim=model.head_dim,
            )
            rule = plan(cluster, shape, policy="paper")
            begin = time.perf_counter()
            planned = plan(cluster, shape)
            seconds.append(time.perf_counter() - begin)
            missed = (
                planned.prediction.layer_us / plan(cluster, shape, effort=None).prediction.layer_us
            )
            before = step_ms(model, cluster, shape, rule.prediction)
            after = step_ms(model, cluster, shape, planned.prediction)
            gains.append(before / after)
            print(
                f"| {num_machines} x {name} | {workload} | {short(rule)} | {before:.1f} | "
                f"{short(planned)} | {after:.1f} | {before / after:.2f} | {missed - 1:.1%} |"
            )
    print(
        f"\n{len(gains)} cases: mean gain {sum(gains) / len(gains):.3f}, most {max(gains):.2f}. "
        f"Planning took {1e3 * sorted(seconds)[len(seconds) // 2]:.0f} ms in the median and "
        f"{1e3 * max(seconds):.0f} ms at most, on a shared core."
    )


if __name__ == "__main__":
    main()
