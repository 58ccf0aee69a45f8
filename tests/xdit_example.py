"""A script shaped like xDiT's examples: its parser, its config, xDiTParallel around a pipeline.

It knows nothing of this package. The latents are compared with those of the same diffusers
pipeline in one process.
"""

import torch
import torch.distributed
from diffusers import FluxPipeline
from xfuser import xDiTParallel, xFuserArgs
from xfuser.config import FlexibleArgumentParser
from xfuser.core.distributed import get_world_group, is_dp_last_group


def main():
    parser = FlexibleArgumentParser(description="xFuser Arguments")
    args = xFuserArgs.add_cli_args(parser).parse_args()
    engine_args = xFuserArgs.from_cli_args(args)
    engine_config, input_config = engine_args.create_config()
    local_rank = get_world_group().local_rank
    pipe = FluxPipeline.from_pretrained(
        engine_config.model_config.model, torch_dtype=torch.float32
    ).to(f"cuda:{local_rank}")
    call = {
        "height": input_config.height,
        "width": input_config.width,
        "prompt": input_config.prompt,
        "num_inference_steps": input_config.num_inference_steps,
        "max_sequence_length": 32,
        "guidance_scale": 3.5,
        "output_type": "latent",
    }

    def generator():
        return torch.Generator(device="cuda").manual_seed(input_config.seed)

    expected = pipe(**call, generator=generator()).images
    torch.cuda.reset_peak_memory_stats()
    paralleler = xDiTParallel(pipe, engine_config, input_config)
    out = paralleler(**call, generator=generator())
    peak_memory = torch.cuda.max_memory_allocated(device=f"cuda:{local_rank}")
    if is_dp_last_group():
        difference = float((out.images - expected).norm() / expected.norm())
        print(f"peak memory {peak_memory}, relative difference {difference:.3e}")
        assert difference < 1e-5, difference


if __name__ == "__main__":
    main()
