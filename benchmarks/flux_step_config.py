"""What flux_step.py measures: the model, the ways to run a step, the checked arguments."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from swiftfusion_xdit.envs import SCHEDULES

TEXT_TOKENS = 512
FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TINY_SIZES = (128, 256)
TINY_TEXT_TOKENS = 32
TINY = FLUX_DEV | {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
KINDS = ("stock", "ours", "ceiling")
COMPILE = ("whole", "blocks")
# The two that xDiT runs on a CPU; it refuses the second one's ring, for want of an LSE.
BACKENDS = {"cuda": ("CUDNN", "FLASH_4"), "cpu": ("SDPA_FLASH", "SDPA")}
# Rounding alone makes 0.02 in bf16 after 57 blocks, attention with its keys mixed up 0.5.
MAX_ERROR = {torch.bfloat16: 0.1, torch.float32: 1e-4}
NORM_WEIGHT = 1.5  # of q and k: sharp enough attention to make errors in it visible in the output
WARM_UPS = {False: 2, True: 4}  # compiled: compile, record a graph, replay
HOST = "127.0.0.1"
PEER_TIMEOUT_S = 180.0
SEED = 1234
STATE = ("_RUNTIME",)  # where xfuser keeps its runtime state
GIB = 2**30
HEADINGS = ("strategy", "ms (quartiles)", "best stock /", "host ms", "peak GiB", "error", "note")


@dataclass(frozen=True)
class Case:
    """One way to run a step. ``ulysses``, ``ring``: of the groups that xDiT has meanwhile."""

    kind: str
    backend: str
    ulysses: int
    ring: int = 1
    schedule: str = "auto"
    compiled: bool = False

    @property
    def name(self) -> str:
        if self.kind == "stock":
            return f"xDiT u{self.ulysses} r{self.ring} {self.backend}"
        if self.kind == "ceiling":
            return f"no communication {self.backend}"
        forced = "" if self.schedule == "auto" else f"/{self.schedule}"
        return f"torus{forced} {self.backend}"


@dataclass(frozen=True)
class Settings:
    """The checked arguments. Raises ValueError naming the argument, its rule and the value."""

    sizes: tuple[int, ...]
    tiny: bool
    device: str
    ranks: int
    kinds: tuple[str, ...]
    backends: tuple[str, ...]
    schedules: tuple[str, ...]
    only: tuple[str, ...]
    compile: str | None
    compile_mode: str | None
    compile_seconds: float
    rounds: int
    steps: int

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size % 16 or (size // 16) ** 2 % self.ranks:
                raise ValueError(f"--sizes: ({size} / 16)^2 must be whole and divide by the ranks")
        heads = self.config["num_attention_heads"]
        if self.ranks < 2 or heads % self.ranks or self.text_tokens % self.ranks:
            raise ValueError(f"--ranks must be above 1 and divide {heads} heads, got {self.ranks}")
        if not set(self.kinds) <= set(KINDS) or not set(self.schedules) <= set(SCHEDULES):
            raise ValueError(f"--kinds are of {KINDS}, --schedules of {SCHEDULES}")
        if min(self.rounds, self.steps) < 1:
            raise ValueError("--rounds and --steps must be at least 1")

    @property
    def config(self) -> dict[str, Any]:
        return TINY if self.tiny else FLUX_DEV

    @property
    def text_tokens(self) -> int:
        return TINY_TEXT_TOKENS if self.tiny else TEXT_TOKENS

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def cases(self) -> list[Case]:
        cases = []
        for backend in self.backends:
            cases += [
                Case("stock", backend, self.ranks),
                Case("stock", backend, 1, self.ranks),
                *(Case("ours", backend, self.ranks, schedule=name) for name in self.schedules),
                Case("ceiling", backend, self.ranks),
            ]
        cases = [
            case
            for case in cases
            if case.kind in self.kinds and (not self.only or case.name in self.only)
        ]
        compiled = [dataclasses.replace(case, compiled=True) for case in cases]
        return cases + (compiled if self.compile else [])


@dataclass
class Found:
    """What this rank found about a case."""

    failure: str | None = None
    error: float | None = None
    peak_bytes: int = 0
    symmetric_bytes: int = 0
    plan: str | None = None
    compiler: dict[str, int] = field(default_factory=dict)
    first_steps_s: float = 0.0
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
