"""xDiT's Ray workers: the plugin is loaded in each, and torus runs there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swiftfusion_xdit.cli.launch import free_port
from tests.test_xdit_launch import ROOT, environment

pytest.importorskip("ray", reason="needs ray")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs xDiT on CPU ranks")


def run(checkpoint: Path) -> None:
    """In a process of its own: xDiT's executor, on as many GPUs as Ray is told that there are."""
    import ray
    import xfuser
    from xfuser.ray.pipeline.pipeline_utils import RayDiffusionPipeline

    from tests import xdit_cases
    from tests.xdit_models import pixart

    pipeline, call = pixart.build("even")
    call |= {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}
    expected = pipeline(**call, return_dict=False)[0]
    pipeline.save_pretrained(checkpoint)
    config, _ = xfuser.xFuserArgs(
        model=str(checkpoint),
        use_ray=True,
        ray_world_size=2,
        ulysses_degree=2,
        sp_strategy="torus",
        sp_mesh="torus=1,ulysses=1,ring=2",
    ).create_config()
    ray.init(num_gpus=2, num_cpus=2, include_dashboard=False)
    try:
        runner = RayDiffusionPipeline.from_pretrained(
            xfuser.xFuserPixArtSigmaPipeline, str(checkpoint), config
        )
        outs = [out for out in runner(**call) if out is not None]
        found = ray.get([worker.__ray_call__.remote(what_ran) for worker in runner.workers])
    finally:
        ray.shutdown()
    (out,) = outs  # xDiT hands the result out on one worker
    assert xdit_cases.relative_difference(out, expected) <= 1e-5
    # 2 steps, 2 layers.
    assert found == [("torus=1,ulysses=1,ring=2", 4, True)] * 2, found


def what_ran(worker: object) -> tuple[str, int, bool]:
    """Inside a worker: the mesh, how many calls ran on it, and whether any bytes were sent."""
    from swiftfusion_xdit.xdit import session

    current = session.current()
    assert current is not None
    (parallel,) = current._open.values()
    stats = parallel.stats()
    return str(parallel.mesh), stats["attention_calls"], stats["same_machine"]["bytes"] > 0


def test_torus_runs_in_ray_workers(tmp_path: Path) -> None:
    env = environment(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
    )
    env["PYTHONPATH"] = ":".join([str(ROOT), *(path for path in sys.path if path)])
    command = [sys.executable, "-m", "tests.test_xdit_ray", str(tmp_path / "checkpoint")]
    done = subprocess.run(
        command, cwd=ROOT, env=env, timeout=240, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
