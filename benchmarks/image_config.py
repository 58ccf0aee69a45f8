"""What image.py measures: the launches, the checked arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftfusion_xdit.cli.tiny_models import PIXELS_PER_TOKEN, choose_num_heads
from swiftfusion_xdit.envs import SCHEDULES, STRATEGIES

MODEL = "black-forest-labs/FLUX.1-dev"  # the name that xDiT's --model takes
# The CPU's is the one kernel there that gives the log-sum-exp, which a ring needs.
BACKENDS = {"cuda": ("CUDNN", "FLASH_4"), "cpu": ("SDPA_FLASH",)}
# xDiT refuses a ring with these: they give no log-sum-exp.
WITHOUT_RING = ("SDPA", "SDPA_MATH", "FLASH_4", "FLASH_4_FP4")
SIZES = {"cuda": 1024, "cpu": 128}
STEPS = {"cuda": 28, "cpu": 4}
ROUNDS = {"cuda": 2, "cpu": 1}
LAUNCH_S = {False: 180.0, True: 420.0}  # eager, and with xDiT's compiling
# Rows of the text, which are attended too.
TEXT_TOKENS = {"cuda": 512, "cpu": 64}
ROOTS = {"cuda": Path("out/image/flux"), "cpu": Path("out/image/tiny")}
FULL_HEADS = 24


@dataclass(frozen=True)
class Case:
    """One command line. ``ulysses``, ``ring``: the degrees that xDiT is given."""

    strategy: str
    backend: str
    ulysses: int
    ring: int
    schedule: str = "auto"

    @property
    def name(self) -> str:
        if self.strategy != "torus":
            return f"{self.strategy} u{self.ulysses} r{self.ring} {self.backend}"
        forced = "" if self.schedule == "auto" else f"/{self.schedule}"
        return f"torus{forced} {self.backend}"

    @property
    def label(self) -> str:
        """The name as a file's."""
        return self.name.replace(" ", "_").replace("/", "_")


@dataclass(frozen=True)
class Settings:
    """The checked arguments. Raises ValueError naming the argument, its rule and the value."""

    tiny: bool
    size: int
    steps: int
    ranks: int
    strategies: tuple[str, ...]
    backends: tuple[str, ...]
    schedules: tuple[str, ...]
    only: tuple[str, ...]
    compile: bool
    rounds: int
    images: int
    warmup_calls: int
    max_difference: float
    checkpoint: Path
    timeout: float
    launch_timeout: float

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("rounds", 1), ("images", 1), ("warmup_calls", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {least}, got {value}"
                )
        for name in ("timeout", "launch_timeout", "max_difference"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        self._check_ranks()
        for name, known in (("strategies", STRATEGIES), ("schedules", SCHEDULES)):
            if not set(getattr(self, name)) <= set(known):
                got = ",".join(getattr(self, name))
                raise ValueError(f"--{name} must be of {', '.join(known)}, got {got}")
        names = [case.name for case in self._all_cases()]
        if unknown := set(self.only) - set(names):
            raise ValueError(
                f"--only must name strategies of: {'; '.join(names)}; got {', '.join(unknown)}"
            )
        if not names:
            raise ValueError(
                f"nothing to measure: --strategies {','.join(self.strategies)} with --backends "
                f"{','.join(self.backends)}"
            )

    def _check_ranks(self) -> None:
        if self.ranks < 2 or self.heads % self.ranks:
            raise ValueError(
                f"--ranks must be above 1 and divide {self.heads} heads, got {self.ranks}"
            )
        if self.size < 1 or self.size % PIXELS_PER_TOKEN:
            raise ValueError(f"--size must be a multiple of {PIXELS_PER_TOKEN}, got {self.size}")
        if self.image_tokens % self.ranks or self.text_tokens % self.ranks:
            raise ValueError(
                f"--size must give rows that divide by {self.ranks} ranks, {self.size} has "
                f"{self.image_tokens} of the image and {self.text_tokens} of the text"
            )

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def heads(self) -> int:
        return choose_num_heads(self.ranks, 1) if self.tiny else FULL_HEADS

    @property
    def image_tokens(self) -> int:
        return (self.size // PIXELS_PER_TOKEN) ** 2

    @property
    def text_tokens(self) -> int:
        return TEXT_TOKENS[self.device]

    def _all_cases(self) -> list[Case]:
        cases = []
        for strategy in self.strategies:
            for backend in self.backends:
                if strategy == "torus":
                    # Its planner chooses the mesh: the degrees say how many ranks there are.
                    cases += [
                        Case(strategy, backend, self.ranks, 1, name) for name in self.schedules
                    ]
                    continue
                for ulysses in range(self.ranks, 0, -1):
                    ring = self.ranks // ulysses
                    if ulysses * ring == self.ranks and (ring == 1 or backend not in WITHOUT_RING):
                        cases.append(Case(strategy, backend, ulysses, ring))
        return cases

    def cases(self) -> list[Case]:
        """Every launch of a round, in the order of the first one."""
        return [c for c in self._all_cases() if not self.only or c.name in self.only]

    def as_dict(self) -> dict[str, Any]:
        """For a file of results."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "checkpoint": str(self.checkpoint),
            "device": self.device,
            "image_tokens": self.image_tokens,
            "text_tokens": self.text_tokens,
        }
