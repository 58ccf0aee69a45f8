"""Rank 1 dies between two attention calls; rank 0 must notice, say so and end by itself."""

import os

import torch
import torch.distributed as dist
from xfuser import xFuserArgs
from xfuser.core.distributed import initialize_runtime_state
from xfuser.model_executor.layers.usp import USP


class Pipeline:
    class transformer:
        class config(dict):
            num_attention_heads = 4


args = xFuserArgs(model="tiny", ulysses_degree=2, sp_strategy="torus")
config, _ = args.create_config()
initialize_runtime_state(Pipeline, config)
q = torch.ones(1, 4, 8, 16)
USP(q, q, q)
if dist.get_rank() == 1:
    os._exit(7)
USP(q, q, q)
