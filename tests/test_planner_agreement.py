"""Every process that describes its cluster alike decides alike, whatever its hash seed."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
from swiftfusion_xdit.clusters import preset
from swiftfusion_xdit.planner import plan
from swiftfusion_xdit.simulate.sizes import LayerShape
for name, machines in (("p4de", 2), ("p5", 3), ("h200-8", 1)):
    cluster = preset(name, num_machines=machines, gpus_per_machine=4)
    for rows, heads in ((4608, 24), (17776, 48), (9999, 10)):
        shape = LayerShape.even(cluster.num_ranks, sequence=rows, num_heads=heads, head_dim=128)
        choice = plan(cluster, shape)
        print(choice.describe(), [(str(o.candidate), o.reason) for o in choice.others])
"""


def test_processes_with_different_hash_seeds_choose_alike() -> None:
    outputs = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1 and outputs.pop().count("planned") == 9
