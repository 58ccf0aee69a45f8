"""docs/compatibility.md, written from what runs.

python -m tests.compatibility     runs all of it on CPU ranks and writes the page
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests import compat_calls, compat_models
from tests.distributed import RankPool

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"

# A feature of xDiT, what it is together with torus, and the test that shows it.
FEATURES = [
    ("CFG parallel, data parallel", "exact", "test_xdit_many_groups.py"),
    (
        "fully sharded weights, `--memory_efficient_sharding`",
        "exact",
        "test_xdit_beside.py",
    ),
    ("Ray workers", "exact, on GPUs that Ray is told of", "test_xdit_ray.py"),
    ("keys that PipeFusion keeps", "exact in calls of USP", "test_xdit_patch_cache.py"),
    (
        "torch.compile of a call",
        "one node, but for xDiT's own kernels",
        "test_xdit_calls.py",
    ),
    ("torch.compile of a model", "exact; corrections may break the graph", "test_xdit_beside.py"),
    ("`--use_fp8_comms`", "fp8 on the wire; refused on GPUs", "test_wire_xdit.py"),
    ("StepVideo, Sana linear attention", "xDiT's own, on its groups", "test_xdit_long_context.py"),
    ("tensor parallel", "refused", "test_xdit_refusals.py"),
]
HEAD = """\
# Compatibility

What `--sp-strategy torus` makes of xDiT's models and arguments, with xfuser {version}. Written by
`python -m tests.compatibility` from what ran on CPU ranks; a test checks that it is current.

| word | means |
|---|---|
| exact | agrees with one process to 1e-5 in float32, the norm of the difference over the norm |
| through xDiT | raises; with `--sp-fallback usp` takes xDiT's own path, which is exact |
| refused | raises; the message names the argument and the way out |
| wrong | runs, and is off by more |
| fails | raises something else, never ends, or ends a process |

## Models

Tiny models through xDiT's own wrappers on 4 ranks, against diffusers in one process, on three
meshes. In parentheses: xDiT's own `usp` with `--ulysses_degree 2 --ring_degree 2`, where that
differs. *even*: image rows and text rows divide by the ranks, or the model pads them; *uneven
image*, *uneven text*: they do not; *masked text*: rows of the text, or of some texts of a batch,
are padding.
"""
CALLS = """
## Arguments of attention

One call of USP on 4 ranks, torus=2 x ring=2, against attention in float64. The functions of
quantised and sparse backends run on GPUs only; others stood in for them that depend, as they do, on
what else a head holds and on where its rows lie.
"""
REST = """
## Features of xDiT

| feature | torus | shown by |
|---|---|---|
{rows}

Not run with torus, as they do not run on CPU ranks: asynchronous PipeFusion as a whole,
`--use_parallel_vae`, and `--fully_shard_degree` without `--memory_efficient_sharding`, for which
xDiT takes torch's FullyShardedDataParallel, and that wants an accelerator.

MiniMax-H3, whose rows xDiT splits by the Ulysses degree alone, ran with `--ulysses_degree 4`. Its
text, sound and video are one sequence, which xDiT pads to a multiple of 64 rows: *uneven image* is
a sequence that is none. Causal Wan never splits its sequence: xDiT's runner takes neither
`--ulysses_degree` nor `--ring_degree` for it (`runner_models/causal_wan.py`, `capabilities`), and
its wrapper calls no `USP`. LingBot-Video's wrapper needs the package `lingbot_video`, which neither
xfuser nor diffusers brings, so no tiny model of it can be made.
"""


def page(pools: Callable[[int], RankPool]) -> str:
    from swiftfusion_xdit.xdit.compat import installed_version

    rows = "\n".join(f"| {name} | {word} | `tests/{test}` |" for name, word, test in FEATURES)
    parts = [
        HEAD.format(version=".".join(installed_version().split(".")[:2])),
        "\n".join(compat_models.table(pools)),
        CALLS,
        "\n".join(compat_calls.table(compat_calls.outcomes(pools))),
        REST.format(rows=rows),
    ]
    return "\n".join(parts)


def main() -> None:
    os.environ.update(CUDA_VISIBLE_DEVICES="", LOG_LEVEL="error")
    opened: dict[int, RankPool] = {}

    def pools(size: int) -> RankPool:
        if size not in opened:
            opened[size] = RankPool(size)
        return opened[size]

    try:
        PAGE.write_text(page(pools), encoding="utf-8")
    finally:
        for pool in opened.values():
            pool.close()


if __name__ == "__main__":
    main()
