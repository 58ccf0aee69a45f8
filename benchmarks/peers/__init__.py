"""Other projects' sequence parallelism, one adapter a file, and why some have none."""

from __future__ import annotations

from benchmarks.peers.base import Mode, Peer, Setting
from benchmarks.peers.cache_dit_cp import CacheDit
from benchmarks.peers.diffusers_cp import Diffusers
from benchmarks.peers.torch_cp import TorchContextParallel
from benchmarks.peers.torch_ulysses import TorchUlysses
from benchmarks.peers.yunchang_usp import Yunchang

__all__ = ["NOT_RUN", "PEERS", "Mode", "Peer", "Setting"]

# Under the names that --peers takes.
PEERS: dict[str, Peer] = {
    "diffusers": Diffusers(),
    "yunchang": Yunchang(),
    "cache_dit": CacheDit(),
    "torch_cp": TorchContextParallel(),
    "torch_ulysses": TorchUlysses(),
}

# What has no adapter: wheels of a few megabytes that run under torch 2.11 are the limit.
NOT_RUN = {
    "FlashInfer": "flashinfer-python 0.7.2.post1 is a wheel of 62 MB",
    "TransformerEngine": "2.20.2: its torch part comes as source only, to be compiled against a "
    "core of 277 MB",
    "vLLM-Omni": "0.30.0: its parallel attention imports vllm (0.33.0: a wheel of 336 MB pinned to "
    "torch 2.13.0)",
    "SGLang": "0.5.23 is a wheel of 39 MB pinned to torch 2.14.1",
}
