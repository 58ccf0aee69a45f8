"""What model_step.py measures: the ways to run a step, the checked arguments."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import step_models
from benchmarks.step_models import Latents
from swiftfusion_xdit.envs import SCHEDULES

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
    layer_graphs: bool | None = None  # None: as SWIFTFUSION_LAYER_GRAPHS says, by default auto
    compiled: bool = False

    @property
    def name(self) -> str:
        if self.kind == "stock":
            return f"xDiT u{self.ulysses} r{self.ring} {self.backend}"
        if self.kind == "ceiling":
            return f"no communication {self.backend}"
        forced = "" if self.schedule == "auto" else f"/{self.schedule}"
        graphs = ""
        if self.layer_graphs is not None:
            graphs = " with layer graphs" if self.layer_graphs else " without layer graphs"
        return f"torus{forced} {self.backend}{graphs}"


@dataclass(frozen=True)
class Settings:
    """The checked arguments. Raises ValueError naming the argument, its rule and the value."""

    model: str
    sizes: tuple[str, ...]
    tiny: bool
    device: str
    ranks: int
    kinds: tuple[str, ...]
    backends: tuple[str, ...]
    schedules: tuple[str, ...]
    only: tuple[str, ...]
    layer_graphs: bool
    compile: str | None
    compile_mode: str | None
    compile_seconds: float
    rounds: int
    steps: int
    seconds: float

    def __post_init__(self) -> None:
        heads = self.config["num_attention_heads"]
        if self.ranks < 1 or heads % self.ranks:
            raise ValueError(
                f"--ranks must be at least 1 and divide {heads} heads, got {self.ranks}"
            )
        is_default = self.schedules == ("auto",) and not self.layer_graphs
        if self.ranks == 1 and not (is_default and "stock" in self.kinds):
            raise ValueError(
                "--ranks 1 runs xDiT's own steps alone: --kinds must have stock, --schedules and "
                f"--layer-graphs are of several ranks; got {self.kinds}, {self.schedules} and "
                f"{self.layer_graphs}"
            )
        for size in self.sizes:
            latents = self.latents(size)
            if latents.image_tokens % self.ranks or latents.text % self.ranks:
                raise ValueError(
                    f"--sizes must give rows that divide by {self.ranks} ranks, {size} has "
                    f"{latents.image_tokens} of the image and {latents.text} of the text"
                )
        if unknown := set(self.only) - {case.name for case in self._all_cases()}:
            names = "; ".join(dict.fromkeys(case.name for case in self._all_cases()))
            raise ValueError(f"--only must name strategies of: {names}; got {', '.join(unknown)}")
        if self.compile and self.module.RUNNER is None:
            raise ValueError(f"--compile: xDiT has no runner for {self.module.TITLE}")
        if not set(self.kinds) <= set(KINDS) or not set(self.schedules) <= set(SCHEDULES):
            raise ValueError(
                f"--kinds are of {KINDS}, --schedules of {SCHEDULES}, got {self.kinds} and "
                f"{self.schedules}"
            )
        if min(self.rounds, self.steps) < 1 or not self.seconds > 0:
            raise ValueError(
                "--rounds and --steps must be at least 1 and --seconds above 0, got "
                f"{self.rounds}, {self.steps} and {self.seconds}"
            )

    @property
    def module(self) -> Any:
        return step_models.load(self.model)

    def latents(self, size: str) -> Latents:
        return step_models.latents_of(self.module, size, tiny=self.tiny)

    @property
    def config(self) -> dict[str, Any]:
        return self.module.TINY if self.tiny else self.module.CONFIG

    @property
    def degrees(self) -> list[tuple[int, int]]:
        """xDiT's (Ulysses, ring) on these ranks, Ulysses first."""
        counts = [n for n in range(self.ranks, 0, -1) if self.ranks % n == 0]
        return [(n, self.ranks // n) for n in counts]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def _all_cases(self) -> list[Case]:
        if self.ranks == 1:  # xDiT's own, which others are scaled against
            return [Case("stock", backend, 1) for backend in self.backends]
        cases = []
        for backend in self.backends:
            cases += [
                *(Case("stock", backend, *degrees) for degrees in self.degrees),
                *(
                    Case("ours", backend, self.ranks, schedule=name, layer_graphs=graphs)
                    for name in self.schedules
                    for graphs in ((False, True) if self.layer_graphs else (None,))
                ),
                Case("ceiling", backend, self.ranks),
            ]
        return [case for case in cases if case.kind in self.kinds]

    def cases(self) -> list[Case]:
        """Every way to run a step that was asked for, eager ones first."""
        cases = [c for c in self._all_cases() if not self.only or c.name in self.only]
        compiled = [replace(case, compiled=True) for case in cases if not case.layer_graphs]
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
