"""One launch of image.py: xDiT's command line, its environment, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.image_config import MODEL, Case, Settings
from swiftfusion_xdit.cli.demo_config import launch_environment
from swiftfusion_xdit.cli.demo_report import read_picture
from swiftfusion_xdit.cli.launch import LaunchError, free_port, launch
from swiftfusion_xdit.cli.tiny_models import PROMPT

ROOT = Path(__file__).resolve().parents[1]
SEED = 42
PEER_TIMEOUT_S = 120.0
NOTE_LINES = 12
# What xDiT's runner logs when it begins to compile and when it is ready; it gives no times.
MARKS = {
    "compiling": "Torch.compile enabled. Warming up",
    "ready": "Model initialization complete.",
}
# What rank 0 logs when torus first attends with a shape, unless something else set up logging, and
# what xDiT's runner lists among its arguments.
PLAN = re.compile(r"\btorus: (mesh \S+, schedule \w+)")
ASKED = "sp_strategy: torus"


@dataclass
class Launched:
    """What one launch gave. Without ``failure`` there is a picture, and seconds of each image."""

    failure: str | None = None
    log: list[str] = field(default_factory=list)
    images_s: list[float] = field(default_factory=list)
    load_s: float | None = None
    compile_s: float | None = None
    wall_s: float = 0.0
    picture: np.ndarray | None = None
    plan: str | None = None


def xdit_command(settings: Settings, case: Case, saved: Path) -> list[str]:
    """What a user types to draw an image with ``case``; xDiT saves it into ``saved``."""
    size, text = str(settings.size), str(settings.text_tokens)
    command = [sys.executable, "-m", "swiftfusion_xdit", "xdit"]
    command += ["--master_port", str(free_port()), "--nproc_per_node", str(settings.ranks)]
    command += ["--model", MODEL, "--height", size, "--width", size, "--seed", str(SEED)]
    command += ["--num_inference_steps", str(settings.steps), "--max_sequence_length", text]
    command += ["--prompt", PROMPT, "--output_directory", str(saved)]
    command += ["--ulysses_degree", str(case.ulysses), "--ring_degree", str(case.ring)]
    command += ["--attention_backend", case.backend]
    # Of more than one image xDiT leaves the first one's time out, which is the warm-up.
    command += ["--num_iterations", str(settings.images + 1)]
    command += ["--warmup_calls", str(settings.warmup_calls)]
    if settings.compile:
        command += ["--use_torch_compile"]
    if case.strategy != "usp":
        command += ["--sp-strategy", case.strategy]
    if case.schedule != "auto":
        command += ["--sp-schedule", case.schedule]
    return command


def environment(settings: Settings, scratch: Path) -> dict[str, str]:
    """That of the demo's launches, with the GPUs where they are asked for."""
    env = launch_environment(scratch)
    env.setdefault("SWIFTFUSION_TIMEOUT_S", str(PEER_TIMEOUT_S))
    env.pop("LOG_LEVEL", None)  # xDiT's log says when it is ready
    if not settings.tiny:
        del env["CUDA_VISIBLE_DEVICES"]
        if "CUDA_VISIBLE_DEVICES" in os.environ:
            env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    # xDiT finds the checkpoint by its name in the working directory: paths must not be relative.
    paths = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(str(Path(part).resolve()) for part in paths)])
    return env


class Marks:
    """When xDiT's log first said what is in ``MARKS``, in seconds from when this was made."""

    def __init__(self, log: Path) -> None:
        self._log, self._start_s = log, time.monotonic()
        self.seen: dict[str, float] = {}

    def look(self) -> None:
        if len(self.seen) == len(MARKS):
            return
        text = self._log.read_text(encoding="utf-8", errors="replace")
        for name, words in MARKS.items():
            if name not in self.seen and words in text:
                self.seen[name] = round(time.monotonic() - self._start_s, 2)

    def load_s(self) -> float | None:
        """Until the weights are on the devices: processes, imports and loading."""
        return self.seen.get("compiling", self.seen.get("ready"))

    def compile_s(self) -> float | None:
        if not {"compiling", "ready"} <= self.seen.keys():
            return None
        return round(self.seen["ready"] - self.seen["compiling"], 2)


def run_case(settings: Settings, case: Case, scratch: Path, timeout_s: float) -> Launched:
    """Launch xDiT once. What fails, or is not done in ``timeout_s``, is in the result."""
    saved = scratch / "saved"
    saved.mkdir(parents=True)
    log = scratch / "log"
    log.touch()
    marks = Marks(log)
    found = Launched()
    start_s = time.monotonic()
    try:
        launch(
            xdit_command(settings, case, saved),
            log=log,
            cwd=settings.checkpoint,
            env=environment(settings, scratch),
            timeout_s=timeout_s,
            on_poll=marks.look,
        )
        found.images_s = read_timings(saved, settings.images)
        found.picture = read_picture(saved)
        found.plan = read_plan(log, case)
    except LaunchError as error:
        found.failure = summary(str(error))
    except (OSError, ValueError) as error:
        found.failure = str(error)
    found.wall_s = round(time.monotonic() - start_s, 1)
    found.load_s, found.compile_s = marks.load_s(), marks.compile_s()
    if found.failure is not None:
        found.log = last_lines(log)
    return found


def read_timings(saved: Path, images: int) -> list[float]:
    """Seconds of each image but the first, which xDiT wrote.

    Raises:
        FileNotFoundError: xDiT wrote none.
        ValueError: they are not as many as there should be, or not times.
    """
    found = json.loads((saved / "timings.json").read_text(encoding="utf-8"))
    if len(found) != images or not all(isinstance(s, float) and s > 0 for s in found):
        raise ValueError(f"xDiT's timings.json must hold the seconds of {images} images: {found}")
    return found


def read_plan(log: Path, case: Case) -> str | None:
    """What torus logged that it runs; None of another strategy.

    Raises:
        ValueError: the strategy that ran is not the one that was asked for.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    plans = list(dict.fromkeys(PLAN.findall(text)))
    has_torus = bool(plans) or ASKED in text
    if has_torus is not (case.strategy == "torus"):
        knows = "it" if has_torus else "nothing of it"
        raise ValueError(f"{case.strategy} was asked for; of torus xDiT's log says {knows}")
    return " / ".join(plans) or None


def summary(message: str) -> str:
    """What a LaunchError says, without the command and the log's end."""
    how = message.splitlines()[0].split(": ")[0]
    first = re.search(r"^first error in the log: (.*)$", message, re.MULTILINE)
    return f"{how}; {first[1]}" if first else how


def last_lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip()][-NOTE_LINES:]
