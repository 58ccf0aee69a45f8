"""What `swiftfusion demo` is asked for, checked, and the environment of what it launches."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from swiftfusion_xdit.cli.tiny_models import MODELS, PIXELS_PER_TOKEN, TinyModel, find


@dataclass(frozen=True)
class DemoConfig:
    """A checked set of the demo's arguments.

    Raises:
        ValueError: naming the argument, its rule and the values.
    """

    ranks: int
    machines: int
    model: str
    steps: int
    size: int
    output: Path
    timeout_s: float
    choices: tuple[str, ...] = tuple(MODELS)

    def __post_init__(self) -> None:
        for name, least in (("ranks", 2), ("machines", 1), ("steps", 1), ("size", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
        if self.ranks % self.machines:
            raise ValueError(
                f"--machines must divide --ranks: {self.ranks} ranks on {self.machines} machines"
            )
        if self.model not in self.choices:
            names = ", ".join(self.choices)
            raise ValueError(f"--model must be one of {names}, got {self.model!r}")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(
                f"--timeout must be a positive number of seconds, got {self.timeout_s}"
            )
        self._check_size()
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output must be a directory, and {self.output} is not one")

    def _check_size(self) -> None:
        # Stock xDiT pads or fails where tokens do not divide: nothing to compare with.
        if self._divides(self.size):
            return
        step = PIXELS_PER_TOKEN * self.ranks
        above = next(n for n in range(self.size, self.size + step + 1) if self._divides(n))
        raise ValueError(
            f"--size must be a multiple of {PIXELS_PER_TOKEN} that gives tokens divisible by "
            f"--ranks, so that stock xDiT is exact: got size {self.size} with {self.ranks} ranks; "
            f"the next that works is {above}"
        )

    def _divides(self, size: int) -> bool:
        return size % PIXELS_PER_TOKEN == 0 and self.tiny.num_tokens(size) % self.ranks == 0

    @property
    def tiny(self) -> TinyModel:
        return find(self.model)

    @property
    def ranks_per_machine(self) -> int:
        return self.ranks // self.machines


def launch_environment(home: Path) -> dict[str, str]:
    """For launches: CPU only, offline, nobody's settings; `home` takes the caches of the hub."""
    foreign = ("SWIFTFUSION_", "TORCHELASTIC_", "HF_", "MASTER_")
    ranked = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"}
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ranked and not key.startswith(foreign)
    }
    env |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(home / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
    }
    if "SWIFTFUSION_TIMEOUT_S" in os.environ:
        env["SWIFTFUSION_TIMEOUT_S"] = os.environ["SWIFTFUSION_TIMEOUT_S"]
    return env
