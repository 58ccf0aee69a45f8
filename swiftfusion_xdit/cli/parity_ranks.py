"""What one rank does for `swiftfusion demo --parity`: every model's pipeline in turn.

With `single` the rank is alone and runs diffusers' own pipelines, without xDiT. With a strategy the
ranks run what `xdit` runs, xDiT's runner, in one process for all models; for CogVideoX, which that
runner does not know, xDiT's pipeline class.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftfusion_xdit.cli.tiny_models import COGVIDEOX, VIDEO_FRAMES, TinyModel, find

# One CPU kernel for all runs: the only one that gives the log-sum-exp, which xDiT's Ring needs.
BACKEND = "SDPA_FLASH"
SEED = 42
GUIDANCE = 4.0
NEGATIVE_PROMPT = "blurred"
FLOW_SHIFT = 3.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", required=True)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True, help="of the runs with a strategy")
    parser.add_argument("--machines", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    rank = os.environ.get("RANK", "0")
    for name in args.models:
        model = find(name)
        if args.strategy == "single":
            recorded = run_diffusers(model, args)
        elif model is COGVIDEOX:
            recorded = run_wrapped(model, args)
        else:
            recorded = run_runner(model, args)
        if recorded:  # some models decode on the last rank only
            latents, picture = recorded["latents"], recorded["picture"]
            np.savez(args.output / f"{name}_rank{rank}.npz", latents=latents, picture=picture)
        print(f"finished {name}", flush=True)


def record_decode(pipeline: Any) -> dict[str, np.ndarray]:
    """Filled by the pipeline's VAE: `latents` that enter it, and `picture [h, w, 3]` in 0..1.

    The picture is the first frame of a video. Neither is rounded to eight bits.
    """
    recorded: dict[str, np.ndarray] = {}
    decode = pipeline.vae.decode

    def decode_and_record(latents: Any, *args: Any, **kwargs: Any) -> Any:
        out = decode(latents, *args, **kwargs)
        sample = out[0].detach().float()[0]  # [3, h, w] or [3, frames, h, w]
        first = sample if sample.dim() == 3 else sample[:, 0]
        picture = (first / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
        recorded.update(latents=latents.detach().float().numpy(), picture=picture.numpy())
        return out

    pipeline.vae.decode = decode_and_record
    return recorded


def call_arguments(model: TinyModel, args: argparse.Namespace) -> dict[str, Any]:
    """What xDiT's runner would pass to this model's pipeline, for a run of diffusers."""
    arguments: dict[str, Any] = {
        "prompt": model.prompt(args.ranks),
        "height": args.size,
        "width": args.size,
        "num_inference_steps": args.steps,
        "true_cfg_scale" if model.name == "qwen_image" else "guidance_scale": GUIDANCE,
    }
    if model.is_video:
        arguments["num_frames"] = VIDEO_FRAMES
    if model.name in ("wan", "qwen_image"):
        arguments["negative_prompt"] = NEGATIVE_PROMPT
    if model.name == "flux":
        arguments["max_sequence_length"] = text_tokens(args.ranks)
    return arguments


def text_tokens(num_ranks: int) -> int:
    """A text length of about 64 that divides by the ranks, so that stock xDiT is exact."""
    return -(-64 // num_ranks) * num_ranks


def load(model: TinyModel) -> Any:
    """diffusers' pipeline, its weights rounded as in xDiT's runner, which loads bfloat16."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(model.checkpoint, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


@torch.no_grad()
def run_diffusers(model: TinyModel, args: argparse.Namespace) -> dict[str, np.ndarray]:
    pipeline = load(model)
    recorded = record_decode(pipeline)
    pipeline(**call_arguments(model, args), generator=torch.Generator().manual_seed(SEED))
    return recorded


def run_runner(model: TinyModel, args: argparse.Namespace) -> dict[str, np.ndarray]:
    from xfuser import xFuserArgs
    from xfuser.config import FlexibleArgumentParser
    from xfuser.runner import xFuserModelRunner

    parser = xFuserArgs.add_runner_args(FlexibleArgumentParser())
    config = vars(parser.parse_args(runner_command(model, args)))
    runner = xFuserModelRunner(config)
    inputs = runner.preprocess_args(config)
    try:
        runner.initialize(inputs)
        # The runner rounds to bfloat16, which would hide the differences that are looked for.
        runner.model.pipe.to(torch.float32)
        recorded = record_decode(runner.model.pipe)
        runner.run(inputs)
    finally:
        leave_groups()
    return recorded


def runner_command(model: TinyModel, args: argparse.Namespace) -> list[str]:
    """The arguments of `xdit` for this run."""
    command = ["--model", model.checkpoint, "--prompt", model.prompt(args.ranks)]
    command += ["--height", str(args.size), "--width", str(args.size), "--seed", str(SEED)]
    command += ["--num_inference_steps", str(args.steps), "--guidance_scale", str(GUIDANCE)]
    command += ["--negative_prompt", NEGATIVE_PROMPT, "--attention_backend", BACKEND]
    if model.name == "wan":
        command += ["--flow_shift", str(FLOW_SHIFT)]
    command += [part.format(text_tokens=text_tokens(args.ranks)) for part in model.arguments]
    for name, value in degrees(args).items():
        command += [f"--{name}", str(value)]
    return command


def degrees(args: argparse.Namespace) -> dict[str, Any]:
    """Stock degrees are USP's own: Ulysses inside a machine, Ring across."""
    return {
        "ulysses_degree": args.ranks // args.machines,
        "ring_degree": args.machines,
        "sp_strategy": args.strategy,
        "sp_machines": str(args.machines),
    }


@torch.no_grad()
def run_wrapped(model: TinyModel, args: argparse.Namespace) -> dict[str, np.ndarray]:
    import xfuser
    from xfuser.core.distributed import init_distributed_environment

    init_distributed_environment()
    call = call_arguments(model, args)
    settings = {"height": args.size, "width": args.size, "num_frames": VIDEO_FRAMES}
    engine_args = xfuser.xFuserArgs(
        model=model.checkpoint, attention_backend=BACKEND, **settings, **degrees(args)
    )
    config, _ = engine_args.create_config()
    pipeline = load(model)
    recorded = record_decode(pipeline)
    try:
        wrapped = getattr(xfuser, f"xFuser{model.pipeline}")(pipeline, config)
        wrapped(**call, generator=torch.Generator().manual_seed(SEED))
    finally:
        leave_groups()
    return recorded


def leave_groups() -> None:
    """Give up xDiT's model-parallel groups, which the next model makes again."""
    from xfuser.core.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    main()
